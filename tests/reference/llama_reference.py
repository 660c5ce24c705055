"""A second implementation of the Llama graph and of the sampler, in numpy, to check the server against.

It shares nothing with the server: the file is read by the `gguf` package, every tensor becomes f32, and each step of the
graph is one line of arithmetic. It is written to be checked by eye, not to be fast.

    model = Reference("model.gguf")
    logits = model.forward([1, 2, 3])            # [3, vocabulary]; positions 0, 1, 2
    logits = model.forward([4], model.cache)     # goes on at position 3
"""

from __future__ import annotations

import re

import gguf
import numpy as np


class Cache:
    """Keys and values of the positions so far: per layer `[positions, kv_heads, head_dim]` each."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype):
        self.k = [np.zeros((0, kv_heads, head_dim), dtype) for _ in range(layers)]
        self.v = [np.zeros((0, kv_heads, head_dim), dtype) for _ in range(layers)]

    def __len__(self) -> int:
        return len(self.k[0])


class Reference:
    """The Llama graph (grouped-query attention, interleaved rotary embedding, gated SiLU feed-forward)."""

    def __init__(self, path: str, dtype=np.float32, kv_float16: bool = True, int8_activations: bool = False):
        """`kv_float16`: round keys and values to float16, as the server's pages hold them.
        `int8_activations`: round what quantised weights are multiplied with, as the server does by default."""
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        family = self.fields["general.architecture"]
        if family != "llama":
            raise ValueError(f"{path} holds a {family} model; this reference computes llama only")
        self.weights = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(dtype) for tensor in reader.tensors
        }
        self.quantised = {
            tensor.name for tensor in reader.tensors if tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        }
        self.dtype, self.kv_float16, self.int8_activations = dtype, kv_float16, int8_activations
        self.layers = self.fields["llama.block_count"]
        self.heads = self.fields["llama.attention.head_count"]
        self.kv_heads = self.fields["llama.attention.head_count_kv"]
        self.width = self.fields["llama.embedding_length"]
        self.head_dim = self.width // self.heads
        self.eps = self.fields["llama.attention.layer_norm_rms_epsilon"]
        dims = self.fields["llama.rope.dimension_count"]
        if dims != self.head_dim:
            raise ValueError(f"only whole heads are rotated here, not {dims} of {self.head_dim} values")
        base = self.fields["llama.rope.freq_base"]
        self.frequencies = base ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)

    def new_cache(self) -> Cache:
        return Cache(self.layers, self.kv_heads, self.head_dim, self.dtype)

    def norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        mean_square = np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True)
        return (x / np.sqrt(mean_square + self.eps) * weight).astype(self.dtype)

    def rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """`x`: `[tokens, heads, head_dim]`; values 2i and 2i + 1 of a head are one pair."""
        angles = positions[:, None, None] * self.frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        even, odd = x[..., 0::2], x[..., 1::2]
        rotated = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
        return rotated.reshape(x.shape).astype(self.dtype)

    def stored(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float16).astype(self.dtype) if self.kv_float16 else x

    def product(self, x: np.ndarray, name: str) -> np.ndarray:
        """`x · weightᵀ`. Where the weight is quantised, each 32 values of `x` become whole multiples, −127 to 127, of a 127th of
        the largest of them (halves go to the even neighbour)."""
        if self.int8_activations and name in self.quantised:
            blocks = x.astype(np.float32).reshape(-1, 32)
            largest = np.abs(blocks).max(axis=1, keepdims=True)
            safe = np.where(largest < 1e-30, np.float32(1), largest)
            steps = np.where(largest < 1e-30, 0, np.rint(blocks * (np.float32(127) / safe)))
            x = (steps * (largest / np.float32(127))).reshape(x.shape).astype(self.dtype)
        return x @ self.weights[name].T

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, start: int) -> np.ndarray:
        """Causal attention of the tokens from position `start` on: `[tokens, heads, head_dim]`."""
        tokens, group = len(q), self.heads // self.kv_heads
        future = np.arange(len(k))[None, :] > start + np.arange(tokens)[:, None]
        out = np.empty_like(q)
        for head in range(self.heads):
            scores = (q[:, head] @ k[:, head // group].T).astype(np.float64) / np.sqrt(self.head_dim)
            scores[future] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[:, head] = weights @ v[:, head // group]
        return out

    def forward(self, tokens: list[int], cache: Cache | None = None) -> np.ndarray:
        """Logits `[tokens, vocabulary]` of `tokens`, which follow the positions in `cache` and are added to it."""
        cache = cache if cache is not None else self.new_cache()
        start, count = len(cache), len(tokens)
        positions = np.arange(start, start + count)
        x = self.weights["token_embd.weight"][tokens]
        for layer in range(self.layers):
            weight = lambda name: self.weights[f"blk.{layer}.{name}.weight"]  # noqa: E731
            product = lambda x, name: self.product(x, f"blk.{layer}.{name}.weight")  # noqa: E731
            normed = self.norm(x, weight("attn_norm"))
            q = product(normed, "attn_q").reshape(count, self.heads, self.head_dim)
            k = product(normed, "attn_k").reshape(count, self.kv_heads, self.head_dim)
            v = product(normed, "attn_v").reshape(count, self.kv_heads, self.head_dim)
            cache.k[layer] = np.concatenate([cache.k[layer], self.stored(self.rotate(k, positions))])
            cache.v[layer] = np.concatenate([cache.v[layer], self.stored(v)])
            attended = self.attend(self.rotate(q, positions), cache.k[layer], cache.v[layer], start)
            x = x + product(attended.reshape(count, -1), "attn_output")
            normed = self.norm(x, weight("ffn_norm"))
            gate, up = product(normed, "ffn_gate"), product(normed, "ffn_up")
            x = x + product(gate / (1 + np.exp(-gate)) * up, "ffn_down")
        head = "output.weight" if "output.weight" in self.weights else "token_embd.weight"
        return self.product(self.norm(x, self.weights["output_norm.weight"]), head)

    def generate(self, prompt: list[int], count: int) -> list[int]:
        """The greedy continuation of `prompt`, step by step over a cache."""
        cache, output = self.new_cache(), []
        logits = self.forward(prompt, cache)[-1]
        while len(output) < count:
            output.append(int(np.argmax(logits)))
            logits = self.forward(output[-1:], cache)[-1]
        return output


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def uniform(seed: int, position: int) -> float:
    """Philox-2x64-10 (Salmon et al., 2011) with counter (position, 0) and key `seed`; the first word's upper 53 bits."""
    word = (1 << 64) - 1
    left, right, key = position, 0, seed
    for _ in range(10):
        product = left * 0xD2B74407B1CE6E93
        left, right = (product >> 64) ^ key ^ right, product & word
        key = (key + 0x9E3779B97F4A7C15) & word
    return (left >> 11) / 2**53


def sample(
    logits: np.ndarray,
    position: int,
    seed: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    logit_bias: dict[int, float] | None = None,
    prompt: list[int] = (),
    output: list[int] = (),
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> tuple[int, float]:
    """The token drawn at `position`, and how near (in probability) the draw was to giving another one.

    Order: bias, penalties, temperature, top-k, top-p, min-p, one draw over the tokens left, in order of token id.
    """
    logits = logits.astype(np.float64)
    for token, bias in (logit_bias or {}).items():
        logits[token] += bias
    for token in set(prompt) | set(output):
        if repetition_penalty != 1.0:
            logits[token] *= 1 / repetition_penalty if logits[token] > 0 else repetition_penalty
        times = list(output).count(token)
        logits[token] -= presence_penalty * (times > 0) + frequency_penalty * times
    if temperature == 0 or top_k == 1:
        two = np.sort(logits)[-2:]
        return int(np.argmax(logits)), float(two[1] - two[0])
    margins = []
    weights = np.exp((logits - logits.max()) / float(np.float32(temperature)))
    # Likeliest first; of equals, the smaller id.
    ranked = np.lexsort((np.arange(len(weights)), -weights))
    if 0 < top_k < len(ranked):
        inside, outside = weights[ranked[top_k - 1]], weights[ranked[top_k]]
        if inside < 1.01 * outside:
            # Which of the two is kept is a near tie itself; it matters as far as the draw depends on them.
            margins.append(0.0)
        ranked = ranked[:top_k]
    if top_p < 1:
        sums = np.cumsum(weights[ranked])
        enough = sums[-1] * float(np.float32(top_p))
        before = np.concatenate([[0.0], sums[:-1]])
        margins.append(float(np.abs(sums - enough).min() / sums[-1]))
        ranked = ranked[: max(1, int(np.sum(before < enough)))]
    ranked = ranked[weights[ranked] >= float(np.float32(min_p))]
    kept = np.sort(ranked)
    sums = np.cumsum(weights[kept])
    target = sums[-1] * uniform(seed, position)
    # The borders between tokens; the outer two lead to no other token.
    margins.append(float(np.abs(sums[:-1] - target).min() / sums[-1]) if len(kept) > 1 else 1.0)
    return int(kept[min(int(np.searchsorted(sums, target, side="right")), len(kept) - 1)]), min(margins)


class ByteLevelTokenizer:
    """Byte-level BPE with GPT-2's word pattern, every digit on its own (what SmolLM's files call `smollm`)."""

    DIGITS = re.compile(r"(\d)")
    WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?(?:[^\w\s]|_)+|\d|\s+(?!\S)|\s+")

    def __init__(self, fields: dict):
        if (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
            raise ValueError("this tokenizer reads byte-level BPE of the smollm kind only")
        pieces, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        self.ids = {piece: id for id, piece in enumerate(pieces)}
        self.ranks = {tuple(pair.split(" ")): rank for rank, pair in enumerate(fields["tokenizer.ggml.merges"])}
        special = [piece for piece, kind in zip(pieces, kinds) if kind != gguf.TokenType.NORMAL]
        self.special = re.compile("(" + "|".join(re.escape(piece) for piece in special) + ")")
        # GPT-2's printable stand-ins for bytes.
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in plain]
        self.letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}

    def encode(self, text: str) -> list[int]:
        """Special tokens written in `text` are parsed."""
        output = []
        for part in filter(None, self.special.split(text)):
            if self.special.fullmatch(part):
                output.append(self.ids[part])
                continue
            for word in (word for run in self.DIGITS.split(part) for word in self.WORDS.findall(run)):
                output += [self.ids[piece] for piece in self.merge([self.letters[byte] for byte in word.encode()])]
        return output

    def merge(self, pieces: list[str]) -> list[str]:
        while len(pieces) > 1:
            pairs = [(self.ranks.get(pair, len(self.ranks)), at) for at, pair in enumerate(zip(pieces, pieces[1:]))]
            rank, at = min(pairs)
            if rank == len(self.ranks):
                break
            pieces = [*pieces[:at], pieces[at] + pieces[at + 1], *pieces[at + 2 :]]
        return pieces
