"""Speculation, as a user sees it: faster or not, the answer is the same, and the metrics say what it did."""

import subprocess

import harness

RHYME = "Repeat this ten times, word for word: one two three four five six seven eight nine ten."
REQUEST = {"max_tokens": 80, "ignore_eos": True, "logprobs": True, "top_logprobs": 3, "seed": 5}


def answers(server):
    """One greedy and one sampled answer, as a client gets them."""
    given, model = [], server.get("/v1/models")["data"][0]["id"]
    for temperature in (0, 0.7):
        messages = [{"role": "user", "content": RHYME}]
        fields = {**REQUEST, "model": model, "temperature": temperature, "messages": messages}
        answer = server.post("/v1/chat/completions", fields)
        given.append((answer["choices"], answer["usage"]["completion_tokens"]))
    return given


def test_answers_and_log_probabilities_are_the_same_with_speculation_and_without(start):
    guessing, plain = start(), start(flags=["--speculation", "off"])
    assert "speculation ngram" in guessing.stderr() and "speculation off" in plain.stderr()
    assert answers(guessing) == answers(plain)
    drafted, accepted = (f"dormouse_speculation_{what}_tokens_total" for what in ("drafted", "accepted"))
    assert plain.metric(drafted) == plain.metric(accepted) == 0
    assert guessing.metric(drafted) >= guessing.metric(accepted) > 0
    assert guessing.metric("dormouse_steps_total") < plain.metric("dormouse_steps_total")


def test_speculation_of_another_kind_is_refused_with_the_kinds_there_are(tmp_path):
    command = [harness.BINARY, "serve", "--data-dir", tmp_path / "data", "--speculation", "oracle"]
    command = [str(part) for part in command]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=harness.PATIENCE_SECONDS)
    assert refused.returncode == 2
    assert all(word in refused.stderr for word in ("oracle", "ngram", "off")), refused.stderr
