"""The server's tokens and log-probabilities against the numpy reference, on the same GGUF.

The server chooses freely; the reference then reads the very same tokens in one pass and says what it would have chosen
at each position. So one near tie costs one token of agreement and not the rest of the answer.

Most tests run with `--activations int16`, whose products are as near to exact ones as f32 is. With int8, the default, two correct
implementations part: where a value lies between two steps, the last bit of a sum decides, and by the last layer that noise
is as large as the rounding's own. There, agreement is that of the noise.
"""

import contextlib
import json
import os
import subprocess
import urllib.request
from pathlib import Path

# Before numpy is imported: its threads and the server's would wait for each other in turn (6 times slower, measured).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest

from llama_reference import ByteLevelTokenizer, Reference, log_softmax, sample, uniform

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(os.environ.get("DORMOUSE_TEST_MODEL", ROOT / "models/weights/SmolLM2-135M-Instruct.Q4_1.gguf"))
BINARY = Path(os.environ.get("DORMOUSE_TEST_BINARY", ROOT / "target/debug/dormouse"))

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # the template's own
PROMPTS = [
    "Name three rivers, and say where each of them ends.",
    "What is 17 + 25? Answer with a number, then explain.",
    "Write a Python function that reverses a list:\n\n    def reverse(items):\n",
    "Übersetze ins Englische: Der Siebenschläfer schläft im Winter – sieben Monate lang. 🐿️",
    "Tell a story of two sentences about a dormouse  who slept    through 1923.",
    "List the planets from the Sun outwards, one in a line.",
    # Long enough for several pages and prefill chunks.
    "Summarise in one sentence: " + " ".join(f"On day {day} the dormouse woke, ate {day % 7} nuts and slept." for day in range(24)),
]
OUTPUT_TOKENS = 20
# Logits of two correct implementations differ by the rounding of f32 sums (about 1e-4) and, where a value lies between
# two steps, by a step of a rounded activation or of a stored key or value.
LOGIT_TIE, DRAW_TIE, LOGPROB_TOLERANCE = 0.02, 0.002, 0.02


def call(url: str, body: dict):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=120)


@pytest.fixture(scope="session")
def reference():
    assert MODEL.exists(), f"no model at {MODEL}: run scripts/fetch_weights, or set DORMOUSE_TEST_MODEL"
    return Reference(str(MODEL))


@pytest.fixture(scope="session")
def tokenizer(reference):
    return ByteLevelTokenizer(reference.fields)


@contextlib.contextmanager
def serving(data: Path, activations: str):
    assert MODEL.exists(), f"no model at {MODEL}: run scripts/fetch_weights, or set DORMOUSE_TEST_MODEL"
    assert BINARY.exists(), f"no server at {BINARY}: run cargo build -p dormouse, or set DORMOUSE_TEST_BINARY"
    command = [BINARY, "serve", "--model", MODEL, "--data-dir", data, "--port", "0", "--activations", activations]
    with open(data / "stderr.log", "w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    line = process.stdout.readline()
    assert line.startswith("ready "), (data / "stderr.log").read_text()
    yield line.split()[1]
    process.terminate()
    process.wait(10)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("int16"), "int16") as url:
        yield url


def turn_of(server: str, prompt: str, **settings) -> tuple[list[dict], dict]:
    """The token events of one session turn in a new session, and the finished turn."""
    session = json.load(call(f"{server}/v1/sessions", {}))["id"]
    body = {"input": prompt, "stream": True, "logprobs": True, "top_logprobs": 5, "max_tokens": OUTPUT_TOKENS} | settings
    events = []
    with call(f"{server}/v1/sessions/{session}/turns", body) as lines:
        for line in lines:
            if line.startswith(b"data: {"):
                events.append(json.loads(line[6:]))
    assert events[-1]["type"] == "session.turn.completed", events[-1]
    deltas = [event for event in events if event["type"] == "session.turn.output_text.delta"]
    assert len(deltas) == events[-1]["turn"]["usage"]["completion_tokens"]
    return deltas, events[-1]["turn"]


def prompt_tokens(tokenizer, prompt: str) -> list[int]:
    return tokenizer.encode(
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.fixture(scope="session")
def greedy(server, reference, tokenizer):
    """For each prompt: its tokens, the server's events, the reference's logits before each output token."""
    runs = []
    for prompt in PROMPTS:
        deltas, turn = turn_of(server, prompt, temperature=0)
        tokens = prompt_tokens(tokenizer, prompt)
        output = [delta["token"] for delta in deltas]
        runs.append((prompt, tokens, turn, deltas, reference.forward(tokens + output)[len(tokens) - 1 : -1]))
    return runs


def accept(differences: list[str], compared: int):
    for difference in differences:
        print("near tie:", difference)
    assert len(differences) * 100 <= compared, f"{len(differences)} of {compared} tokens differ: {differences}"


def test_prompts_have_the_tokens_of_an_independent_tokenizer(greedy):
    for prompt, tokens, turn, _, _ in greedy:
        assert turn["usage"]["prompt_tokens"] == len(tokens), prompt


def test_greedy_tokens_are_the_references(greedy):
    differences, compared = [], 0
    for prompt, _, _, deltas, logits in greedy:
        for index, (delta, row) in enumerate(zip(deltas, logits, strict=True)):
            token, compared = delta["token"], compared + 1
            if token != np.argmax(row):
                gap = row.max() - row[token]
                assert gap < LOGIT_TIE, f"{prompt!r}, token {index}: {token} lies {gap:.4f} below {np.argmax(row)}"
                differences.append(f"{prompt!r}, token {index}: gap {gap:.5f}")
    accept(differences, compared)


def test_log_probabilities_are_the_references(greedy):
    largest = 0.0
    for prompt, _, _, deltas, logits in greedy:
        for index, (delta, row) in enumerate(zip(deltas, log_softmax(logits), strict=True)):
            pairs = [(delta["token"], delta["logprob"]["logprob"]), *delta["logprob"]["top"]]
            assert len(pairs) == 6
            for token, logprob in pairs:
                error = abs(row[token] - logprob)
                largest = max(largest, error)
                assert error < LOGPROB_TOLERANCE, f"{prompt!r}, token {index}, of {token}: {logprob} is not {row[token]}"
            # The five reported are the five likeliest.
            assert min(logprob for _, logprob in pairs) >= np.sort(row)[-5] - LOGPROB_TOLERANCE
    print(f"largest difference of a log-probability: {largest:.6f}")


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.8, "top_p": 0.95, "top_k": 40},
        {"temperature": 1.3, "min_p": 0.05, "presence_penalty": 0.4, "frequency_penalty": 0.3, "logit_bias": {"216": -2}},
        {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2},
    ],
    ids=["top-k and top-p", "min-p, penalties and bias", "top-p and repetition"],
)
def test_seeded_tokens_are_the_references(server, reference, tokenizer, settings):
    differences, compared = [], 0
    for seed, prompt in zip([1, 42, 2**63 + 11], PROMPTS[:3]):
        deltas, _ = turn_of(server, prompt, seed=seed, **settings)
        tokens, output = prompt_tokens(tokenizer, prompt), [delta["token"] for delta in deltas]
        rows = reference.forward(tokens + output)[len(tokens) - 1 : -1]
        bias = {int(token): value for token, value in settings.get("logit_bias", {}).items()}
        for index, row in enumerate(rows):
            context = {"prompt": tokens, "output": output[:index], "logit_bias": bias}
            token, margin = sample(row, len(tokens) + index, seed, **(settings | context))
            compared += 1
            if token != output[index]:
                assert margin < DRAW_TIE, f"seed {seed}, token {index}: {output[index]} is not {token} (margin {margin:.4f})"
                differences.append(f"seed {seed}, token {index}: margin {margin:.5f}")
    accept(differences, compared)


def test_rounding_activations_to_bytes_moves_log_probabilities_by_its_noise_only(reference, tokenizer, tmp_path, monkeypatch):
    """The server's default against the same arithmetic in numpy, and both against exact products."""
    errors, rounding, gaps = [], [], []
    with serving(tmp_path, "int8") as url:
        for prompt in PROMPTS[:4]:
            deltas, _ = turn_of(url, prompt, temperature=0)
            tokens, output = prompt_tokens(tokenizer, prompt), [delta["token"] for delta in deltas]
            exact = reference.forward(tokens + output)[len(tokens) - 1 : -1]
            monkeypatch.setattr(reference, "int8_activations", True)
            rounded = reference.forward(tokens + output)[len(tokens) - 1 : -1]
            monkeypatch.setattr(reference, "int8_activations", False)
            for delta, row, exact_row in zip(deltas, log_softmax(rounded), log_softmax(exact), strict=True):
                errors.append(abs(row[delta["token"]] - delta["logprob"]["logprob"]))
                rounding.append(abs(row[delta["token"]] - exact_row[delta["token"]]))
                gaps.append(row.max() - row[delta["token"]])
    print(f"log-probability: mean error {np.mean(errors):.4f}, of numpy's rounding {np.mean(rounding):.4f}, largest gap {max(gaps):.4f}")
    assert np.mean(errors) < 0.1 and np.max(errors) < 0.6
    assert np.mean(errors) < 2.5 * np.mean(rounding)
    assert np.mean(np.array(gaps) > 0) < 0.1 and max(gaps) < 0.6


def test_steps_over_a_cache_equal_one_pass(reference, tokenizer, monkeypatch):
    """Of the reference itself: otherwise it proves nothing about a server that reads its cache."""
    # Rounding would make steps out of the last bits in which the two differ.
    monkeypatch.setattr(reference, "kv_float16", False)
    tokens = prompt_tokens(tokenizer, PROMPTS[0])
    cache = reference.new_cache()
    rows = [reference.forward(part, cache) for part in (tokens[:20], tokens[20:21], tokens[21:])]
    assert np.abs(np.concatenate(rows) - reference.forward(tokens)).max() < 2e-3


def test_the_random_numbers_are_philox():
    """Known answers of the Random123 distribution (kat_vectors, philox2x64 with ten rounds), first word."""
    assert int(uniform(0, 0) * 2**53) == 0xCA00A0459843D731 >> 11
