"""Writes, for every family, the logits that `transformers` computes for a tiny model with made-up weights.

Each case is expected/NAME.json (the model's config.json, every tensor's name and shape, and what a GGUF file of it says) and
expected/NAME.logits (f32, little-endian, [positions, vocab], of a long prompt the last positions only). Weights are not
stored: `weights` makes them from their names, here and in case.rs, so that they are exact in F32, F16 and BF16. They are
written to a safetensors file under the names that published models use and read back by `transformers`, which refuses names
it does not know. Keys and values are rounded to f16, as KV pages are.

Needs torch, transformers and gguf (PyPI). Usage: generate.py [NAME ...]
"""
import json
import math
import pathlib
import re
import sys
import tempfile

import gguf
import numpy
import torch
from safetensors.numpy import save_file
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

POSITIONS = 100
# Cases of a long prompt, of which the last logits are kept.
FAR_POSITIONS, FAR_KEPT = 8192, 16
FOLDER = pathlib.Path(__file__).parent / "expected"

BASE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 64,
        "intermediate_size": 96, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "rope_theta": 10000.0, "initializer_range": 0.02, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0}


def case(architecture, model_type, **changes):
    return {"architectures": [architecture], "model_type": model_type} | BASE | changes


def llama(**changes):
    return case("LlamaForCausalLM", "llama", **changes)


def gemma3(**changes):
    return case("Gemma3ForCausalLM", "gemma3_text", hidden_activation="gelu_pytorch_tanh", num_hidden_layers=7, head_dim=32,
                num_key_value_heads=1, rms_norm_eps=1e-6, query_pre_attn_scalar=32, sliding_window=20,
                tie_word_embeddings=True, **changes)


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


LONG = {"type": "longrope", "short_factor": [1.0 + 0.05 * i for i in range(6)],
        "long_factor": [1.0 + 0.5 * i for i in range(6)]}
CASES = {
    "llama": llama(num_key_value_heads=4, tie_word_embeddings=True),
    "llama_biased": llama(attention_bias=True),
    "llama3_scaled": llama(rope_theta=500000.0, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}),
    "llama3_far": llama(rope_theta=500000.0, max_position_embeddings=8192, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024}),
    "gemma3_far": gemma3(rope_theta=1000000.0, rope_local_base_freq=10000.0, sliding_window_pattern=6) | {
        "max_position_embeddings": 8192, "sliding_window": 512},
    "llama_linear": llama(rope_scaling={"type": "linear", "factor": 4.0}),
    "llama_dynamic": llama(max_position_embeddings=25, rope_scaling={"type": "dynamic", "factor": 4.0}),
    "llama_yarn": llama(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    "mistral": case("MistralForCausalLM", "mistral", head_dim=24, sliding_window=20),
    "ministral": case("MinistralForCausalLM", "ministral", head_dim=32, sliding_window=20,
                      layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "ministral3": without(case("Ministral3ForCausalLM", "ministral3", head_dim=32, sliding_window=None, rope_parameters={
        "rope_type": "yarn", "type": "yarn", "rope_theta": 1000000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}),
        "rope_theta"),
    "smollm3": case("SmolLM3ForCausalLM", "smollm3", num_hidden_layers=5, no_rope_layers=[1, 1, 1, 0, 1],
                    use_sliding_window=False, sliding_window=None, rope_theta=50000.0, tie_word_embeddings=True),
    "qwen2": case("Qwen2ForCausalLM", "qwen2", use_sliding_window=False, sliding_window=20, max_window_layers=2),
    "qwen2_windowed_yarn": case("Qwen2ForCausalLM", "qwen2", use_sliding_window=True, sliding_window=20, max_window_layers=1,
                                rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    "qwen3": case("Qwen3ForCausalLM", "qwen3", head_dim=32, attention_bias=False, rope_theta=1000000.0, rms_norm_eps=1e-6,
                  tie_word_embeddings=True),
    "qwen3_moe": case("Qwen3MoeForCausalLM", "qwen3_moe", head_dim=32, num_experts=8, num_experts_per_tok=3,
                      moe_intermediate_size=32, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]),
    "qwen3_moe_partly_dense": case("Qwen3MoeForCausalLM", "qwen3_moe", head_dim=32, num_experts=8, num_experts_per_tok=2,
                                   moe_intermediate_size=32, norm_topk_prob=False, decoder_sparse_step=1,
                                   mlp_only_layers=[1]),
    "gemma": case("GemmaForCausalLM", "gemma", hidden_act="gelu_pytorch_tanh", head_dim=32, num_key_value_heads=1,
                  rms_norm_eps=1e-6, tie_word_embeddings=True),
    "gemma2": case("Gemma2ForCausalLM", "gemma2", hidden_activation="gelu_pytorch_tanh", num_hidden_layers=4, head_dim=32,
                   rms_norm_eps=1e-6, query_pre_attn_scalar=32, sliding_window=20, attn_logit_softcapping=5.0,
                   final_logit_softcapping=10.0, tie_word_embeddings=True),
    "gemma3": gemma3(rope_theta=1000000.0, rope_local_base_freq=10000.0, sliding_window_pattern=6,
                     rope_scaling={"rope_type": "linear", "factor": 8.0}),
    "gemma3_by_layer_type": without(gemma3(
        layer_types=["sliding_attention", "full_attention"] * 3 + ["sliding_attention"], rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}), "rope_theta") | {
                "query_pre_attn_scalar": 24},
    "phi3": case("Phi3ForCausalLM", "phi3", sliding_window=20, original_max_position_embeddings=256),
    "phi4_longrope": case("Phi3ForCausalLM", "phi3", partial_rotary_factor=0.75, rope_scaling=LONG,
                          original_max_position_embeddings=32, tie_word_embeddings=True),
    "olmo2": case("Olmo2ForCausalLM", "olmo2", rope_theta=500000.0, rms_norm_eps=1e-6),
    "granite": case("GraniteForCausalLM", "granite", embedding_multiplier=12.0, residual_multiplier=0.22,
                    attention_multiplier=0.125, logits_scaling=8.0, tie_word_embeddings=True),
}


def numbers(name, count):
    """The high bytes of splitmix64, seeded with FNV-1a of the name, as numbers from -128 to 127."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    with numpy.errstate(over="ignore"):
        z = numpy.uint64(seed) + numpy.arange(1, count + 1, dtype=numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
        z ^= z >> numpy.uint64(31)
    return (z >> numpy.uint64(56)).astype(numpy.int64) - 128


def weights(name, shape, norm_centre):
    drawn = numbers(name, int(numpy.prod(shape))).astype(numpy.float32).reshape(shape)
    if name.endswith("norm.weight"):
        return norm_centre + numpy.floor(drawn / 4) / 128
    if name.endswith(".bias"):
        return drawn / 1024
    if "embed" in name:
        return drawn / 128
    # What is added to the residual stream is small beside it, as in trained models.
    return drawn / (4096 if "o_proj" in name else 2048 if "down_proj" in name else 512)


# The architecture of a model type in GGUF files.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "ministral3": "mistral3", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
# Those whose rows of Q and K are permuted on the way, so that neighbours are rotated together.
PERMUTED = {"llama", "mistral3", "smollm3", "granite"}
SETTINGS = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim", "attention.value_length": "head_dim", "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "attention.scale": "attention_multiplier", "logit_scale": "logits_scaling",
}
# What GGUF files of these families cannot say: another window pattern, another attention scale, an unlisted dense layer.
WITHOUT_GGUF = {"ministral", "gemma3_by_layer_type", "qwen3_moe_partly_dense", "qwen2_windowed_yarn", "llama_dynamic"}


def llama3_factors(config):
    """The divisors of the frequencies, as a converter computes them into `rope_freqs.weight`."""
    scaling, dims = config["rope_scaling"], config["hidden_size"] // config["num_attention_heads"]
    low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    factors = []
    for i in range(0, dims, 2):
        wavelength = 2 * math.pi * config["rope_theta"] ** (i / dims)
        ramp = (low / wavelength - 1) / (low / high - 1)
        smooth = min(max(ramp, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return factors


def describe_gguf(name, config, shapes):
    """The settings, tensor names and further tensors of the same model in a GGUF file."""
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    settings = {key: config[ours] for key, ours in SETTINGS.items() if ours in config}
    extra = {}
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        settings["attention.sliding_window"] = config["sliding_window"]
    scaling = config.get("rope_scaling", config.get("rope_parameters", {}))
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in ("linear", "yarn"):
        settings |= {"rope.scaling.type": kind, "rope.scaling.factor": scaling["factor"]}
    if "llama_4_scaling_beta" in scaling:
        settings |= {"attention.temperature_scale": scaling["llama_4_scaling_beta"], "rope.freq_base": scaling["rope_theta"],
                     "rope.scaling.yarn_log_multiplier": scaling["mscale_all_dim"]}
    if kind == "yarn":
        settings["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        extra["rope_freqs.weight"] = llama3_factors(config)
    if kind == "longrope":
        original = config["original_max_position_embeddings"]
        factor = config["max_position_embeddings"] / original
        settings |= {"rope.scaling.original_context_length": original,
                     "rope.scaling.attn_factor": math.sqrt(1 + math.log(factor) / math.log(original)),
                     "rope.dimension_count": 2 * len(scaling["long_factor"])}
        extra |= {"rope_factors_long.weight": scaling["long_factor"], "rope_factors_short.weight": scaling["short_factor"]}
    known = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config["num_hidden_layers"])
    names = {}
    for key in shapes:
        # A converter stacks the experts of a layer into one tensor.
        stacked = re.sub(r"experts\.\d+\.", "experts.", key)
        names[key] = known.get_name(stacked, try_suffixes=(".weight", ".bias"))
        assert names[key], key
    return {"architecture": architecture, "settings": settings, "names": names, "extra": extra,
            "permuted": architecture in PERMUTED}


class HalfCache(DynamicCache):
    def update(self, keys, values, *arguments, **options):
        return super().update(keys.half().to(keys.dtype), values.half().to(values.dtype), *arguments, **options)


def generate(name, config):
    gemma = config["model_type"].startswith("gemma")
    with tempfile.TemporaryDirectory() as folder:
        # Names and shapes as the library itself saves them.
        empty = AutoModelForCausalLM.from_config(AutoConfig.for_model(**without(config, "architectures")))
        empty.save_pretrained(folder)
        with safe_open(f"{folder}/model.safetensors", "numpy") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in sorted(file.keys())}
        tensors = {key: weights(key, shape, 0.0 if gemma else 1.0) for key, shape in shapes.items()}
        save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
        pathlib.Path(f"{folder}/config.json").write_text(json.dumps(config))
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    unused = {key: value for key, value in loading.items() if value}
    assert not unused, unused
    positions, kept = (FAR_POSITIONS, FAR_KEPT) if name.endswith("_far") else (POSITIONS, POSITIONS)
    tokens = [int(number) + 128 for number in numbers("prompt", positions)]
    tokens = torch.tensor([[token % config["vocab_size"] for token in tokens]])
    with torch.no_grad():
        logits = model(tokens, past_key_values=HalfCache(), use_cache=True, logits_to_keep=kept).logits[0].float().numpy()
    assert logits.shape == (kept, config["vocab_size"])
    description = {"config": config, "positions": positions, "tensors": {key: list(shape) for key, shape in shapes.items()}}
    if name not in WITHOUT_GGUF:
        description["gguf"] = describe_gguf(name, config, shapes)
    (FOLDER / f"{name}.json").write_text(json.dumps(description, separators=(",", ":")) + "\n")
    logits.astype("<f4").tofile(FOLDER / f"{name}.logits")
    print(f"{name}: logits from {logits.min():.3} to {logits.max():.3}")


for name in sys.argv[1:] or CASES:
    generate(name, CASES[name])
