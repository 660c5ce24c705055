"""`models inspect`: what is told of good files, and of those that will not run."""

import json
import os
import random
import shutil
import struct
import subprocess

import pytest

import harness

TOKENS = ["<|endoftext|>"] + [chr(code) for code in range(33, 127)]
LLAMA = {
    "general.architecture": "llama", "llama.context_length": 128, "llama.embedding_length": 64, "llama.block_count": 1,
    "llama.feed_forward_length": 96, "llama.attention.head_count": 4, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 0,
}
LLAMA["tokenizer.ggml.tokens"].append("ab")


def tensors(width=64, feed_forward=96, vocabulary=len(TOKENS), kind=0):
    """Names, shapes (rows, columns) and type numbers of a llama of one layer."""
    layer = {"attn_q": (width, width), "attn_k": (width, width), "attn_v": (width, width), "attn_output": (width, width),
             "ffn_gate": (feed_forward, width), "ffn_up": (feed_forward, width), "ffn_down": (width, feed_forward)}
    matrices = {"token_embd.weight": (vocabulary, width)} | {f"blk.0.{name}.weight": shape for name, shape in layer.items()}
    norms = ["output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"]
    return {name: (shape, kind) for name, shape in matrices.items()} | {name: ((width,), 0) for name in norms}


def string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(setting):
    match setting:
        case str():
            return struct.pack("<I", 8) + string(setting)
        case int():
            return struct.pack("<II", 4, setting)
        case float():
            return struct.pack("<If", 6, setting)
        case list():
            return struct.pack("<IIQ", 9, 8, len(setting)) + b"".join(map(string, setting))


def write_gguf(path, settings, tensors):
    """A GGUF file whose tensors are holes: of any size, on no disk."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(settings))
    head += b"".join(string(key) + value(setting) for key, setting in settings.items())
    offset = 0
    for name, (shape, kind) in tensors.items():
        head += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", kind, offset)
        count = 1
        for size in shape:
            count *= size
        offset += -(-count * {0: 4, 1: 2}.get(kind, 4) // 32) * 32
    path.write_bytes(head)
    os.truncate(path, -(-len(head) // 32) * 32 + offset)
    return path


@pytest.fixture
def inspect(tmp_path):
    """Inspects a model; answers what `--json` says, after checking that the words for people agree."""

    def inspect(model, will_run, *flags):
        environment = {**os.environ, "DORMOUSE_DATA_DIR": str(tmp_path / "data"), "HOME": str(tmp_path)}

        def run(*more):
            command = [harness.BINARY, "models", "inspect", str(model), *flags, *more]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL,
                                  timeout=harness.PATIENCE_SECONDS)
            assert done.returncode == (0 if will_run else 1), done.stdout + done.stderr
            assert done.stderr == ""
            return done.stdout

        facts = json.loads(run("--json"))
        last = run().splitlines()[-1]
        assert facts["will_run"] is will_run
        assert last == ("will run here: yes" if will_run else f"will run here: no: {facts['reason']}")
        return facts

    return inspect


def test_the_real_model_is_described_and_will_run(inspect, tmp_path):
    model = tmp_path / "model.gguf"
    shutil.copy(harness.MODEL, model)
    facts = inspect(model, True)
    assert (facts["family"], facts["context"], facts["layers"], facts["vocabulary"]) == ("llama", 8192, 30, 49152)
    assert facts["kv_bytes_per_token"]["f16"] == 30 * 2 * 3 * 64 * 2 == 23040
    assert facts["kv_full_context"]["f16"] == 8192 * 23040
    assert facts["parameters"] == 134515008 and facts["file_size"] == harness.MODEL.stat().st_size
    assert sum(of_type["bytes"] for of_type in facts["tensor_types"].values()) == facts["weight_bytes"]
    assert "Q4_1" in facts["tensor_types"] and facts["end_tokens"]
    assert facts["chat_template"]["renders"] and facts["chat_template"]["system"]
    weights = facts["weights_in_memory"]
    assert facts["memory_needed"] == sum(weights[part] for part in ("packed", "floats", "looked_up")) + facts["scratch_memory"]
    assert facts["memory_total"] >= facts["memory_available"] > 0
    assert facts["pack_file"] is None and facts["pack_folder"] == str(tmp_path) and facts["disk_free"] > 0
    assert facts["isa_tier"]
    # As large as it was said to become.
    environment = {**os.environ, "DORMOUSE_DATA_DIR": str(tmp_path / "data"), "HOME": str(tmp_path)}
    subprocess.run([harness.BINARY, "models", "pack", str(model)], env=environment, check=True, capture_output=True)
    pack = inspect(model, True)["pack_file"]
    assert os.path.getsize(pack) == facts["pack_file_size"] == weights["pack_file"]
    assert "8193" in inspect(model, False, "--ctx", "8193")["reason"]


def test_a_file_that_is_cut_or_not_a_model_will_not_run(inspect, tmp_path):
    whole = harness.MODEL.read_bytes()
    path = tmp_path / "damaged.gguf"
    for length in (0, 3, 20, 100_000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        reason = inspect(path, False)["reason"]
        assert str(path) in reason and ("fetch it again" in reason or "not a GGUF file" in reason), reason
    path.write_bytes(random.Random(1).randbytes(1 << 16))
    assert "not a GGUF file" in inspect(path, False)["reason"]
    path.write_bytes(whole[:4] + random.Random(2).randbytes(1 << 16))
    assert inspect(path, False)["reason"]


def test_a_small_file_without_a_template_runs_for_completions(inspect, tmp_path):
    facts = inspect(write_gguf(tmp_path / "base.gguf", LLAMA, tensors()), True)
    assert facts["chat_template"] is None and any("completions" in note for note in facts["notes"])


def test_what_cannot_be_computed_is_named(inspect, tmp_path):
    path = tmp_path / "model.gguf"
    strange = inspect(write_gguf(path, LLAMA | {"general.architecture": "mamba"}, tensors()), False)
    assert strange["family"] == "mamba" and "'mamba'" in strange["reason"] and "qwen3moe" in strange["reason"]
    reason = inspect(write_gguf(path, LLAMA, tensors(kind=16)), False)["reason"]
    assert "IQ2_XXS" in reason and "Q4_K" in reason
    reason = inspect(write_gguf(path, LLAMA, tensors(feed_forward=128)), False)["reason"]
    assert "ffn_gate" in reason and "96" in reason and "128" in reason
    absurd = {"head_count": 1 << 24, "head_count_kv": 1 << 24, "key_length": 512, "value_length": 512}
    absurd = {f"llama.attention.{name}": size for name, size in absurd.items()} | {"llama.context_length": 1 << 24}
    assert inspect(write_gguf(path, LLAMA | absurd, tensors()), False)["reason"]
    lacking = tensors()
    del lacking["blk.0.ffn_up.weight"]
    assert "blk.0.ffn_up.weight" in inspect(write_gguf(path, LLAMA, lacking), False)["reason"]
    template = LLAMA | {"tokenizer.chat_template": "{% for %}"}
    assert "chat template" in inspect(write_gguf(path, template, tensors()), False)["reason"]
    refusing = LLAMA | {"tokenizer.chat_template": "{{ raise_exception('never') }}"}
    facts = inspect(write_gguf(path, refusing, tensors()), True)
    assert not facts["chat_template"]["renders"] and any("never" in note for note in facts["notes"])


def test_a_model_beyond_this_machines_memory_is_told_at_once(inspect, tmp_path):
    # 2 TiB of F16 in holes.
    settings = LLAMA | {"llama.embedding_length": 1 << 14, "llama.feed_forward_length": 1 << 24, "llama.attention.head_count": 64}
    path = write_gguf(tmp_path / "huge.gguf", settings, tensors(1 << 14, 1 << 24, kind=1))
    assert path.stat().st_size > 1 << 40
    facts = inspect(path, False)
    assert "too little memory" in facts["reason"] and "TiB" in facts["reason"]


def write_safetensors(path, shapes):
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + offset)


def test_a_safetensors_folder_is_described(inspect, tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 95,
              "max_position_embeddings": 128, "num_hidden_layers": 1, "intermediate_size": 96, "rms_norm_eps": 1e-5,
              "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    layer = {"self_attn.q_proj": [64, 64], "self_attn.k_proj": [64, 64], "self_attn.v_proj": [64, 64],
             "self_attn.o_proj": [64, 64], "mlp.gate_proj": [96, 64], "mlp.up_proj": [96, 64], "mlp.down_proj": [64, 96],
             "input_layernorm": [64], "post_attention_layernorm": [64]}
    shapes = {"model.embed_tokens.weight": [95, 64], "model.norm.weight": [64]}
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    write_safetensors(folder / "model.safetensors", shapes)
    assert "tokenizer.json" in inspect(folder, False)["reason"]
    vocabulary = {chr(code): code - 32 for code in range(32, 127)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    tokenizer = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
                 "decoder": None, "truncation": None, "padding": None, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    facts = inspect(folder, True)
    assert (facts["format"], facts["family"], facts["vocabulary"]) == ("safetensors", "LlamaForCausalLM", 95)
    assert facts["weights_in_memory"]["floats"] == facts["weight_bytes"] and "pack_file_size" not in facts
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    assert "LlamaForCausalLM" in inspect(folder, False)["reason"]
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "../model.safetensors" in inspect(folder, False)["reason"]
