"""Writes quant_goldens.txt: random blocks of every supported type and what the `gguf` package decodes them to.

Needs numpy and gguf (PyPI). Each line: type name, hex of the blocks, hex of the
decoded little-endian f32 values.
"""
import hashlib
import pathlib
import warnings

import gguf
import numpy as np

TYPES = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4".split()
# Byte offsets of the f16 scales of a block: random bits there could be infinities.
HALVES = {"F16": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82],
          "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0]}
BLOCKS = 3

random = np.random.default_rng(7)
warnings.simplefilter("ignore")
lines = []
for name in TYPES:
    kind = gguf.GGMLQuantizationType[name]
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    count = 32 if block_len == 1 else BLOCKS
    blocks = random.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    if name == "F32":
        blocks = random.standard_normal((count, 1)).astype("<f4").view(np.uint8)
    if name == "BF16":
        blocks[:, 1] = blocks[:, 1] & 0xBF
    if name == "MXFP4":
        blocks[:, 0] = [0, 1, 130]
    for at in HALVES.get(name, []):
        scale = (random.standard_normal(count) * 0.1).astype("<f2")
        blocks[:, at:at + 2] = scale.view(np.uint8).reshape(count, 2)
    values = gguf.quants.dequantize(blocks.reshape(1, -1), kind).astype("<f4").reshape(-1)
    lines.append(f"{name} {blocks.tobytes().hex()} {values.tobytes().hex()}")
pathlib.Path(__file__).with_name("quant_goldens.txt").write_text("\n".join(lines) + "\n")
