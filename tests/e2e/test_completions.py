"""/v1/completions: raw text and tokens go on, and what the model thinks of them is told."""

import math

import openai
import pytest

import harness

MODEL = harness.MODEL.stem
TEXT = "The capital of France is Paris. The capital of Italy is"


def complete(client, prompt, **fields):
    fields = {"max_tokens": 8, "temperature": 0, **fields}
    return client.completions.create(model=MODEL, prompt=prompt, **fields)


def test_a_text_goes_on_without_a_template(client):
    answer = complete(client, TEXT)
    (choice,) = answer.choices
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert choice.finish_reason == "length" and choice.logprobs is None
    assert "Rome" in choice.text
    # Nothing was put around it: the prompt's own tokens are all that counts.
    assert answer.usage.prompt_tokens < 20
    assert complete(client, TEXT, echo=True).choices[0].text == TEXT + choice.text
    assert complete(client, TEXT, stop=["."]).choices[0].text == choice.text.split(".")[0]


def test_the_default_length_is_openais(client):
    assert client.completions.create(model=MODEL, prompt=TEXT).usage.completion_tokens <= 16


def scored(client, prompt, **fields):
    return complete(client, prompt, echo=True, logprobs=2, max_tokens=1, **fields).choices[0].logprobs


def test_many_prompts_and_tokens_instead_of_text(client):
    one = complete(client, TEXT).choices[0].text
    many = complete(client, [TEXT, "One, two, three,"]).choices
    assert [choice.index for choice in many] == [0, 1]
    assert many[0].text == one and "four" in many[1].text
    echoed = complete(client, [[504, 3575, 282], [28, 1234]], echo=True, max_tokens=1, logprobs=0).choices
    assert [len(choice.logprobs.tokens) for choice in echoed] == [4, 3]
    again = complete(client, [504, 3575, 282], echo=True, max_tokens=1).choices[0]
    assert again.text == echoed[0].text == "".join(echoed[0].logprobs.tokens)


def test_echo_scores_every_token_of_the_prompt(client):
    logprobs = scored(client, TEXT)
    assert "".join(logprobs.tokens[:-1]) == TEXT
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
    for token, offset in zip(logprobs.tokens, logprobs.text_offset):
        assert (TEXT + logprobs.tokens[-1])[offset:].startswith(token)
    for token, logprob, top in list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs))[1:]:
        assert top[token] == logprob <= max(top.values()) <= 0
        assert 2 <= len(top) <= 3 and sum(map(math.exp, top.values())) <= 1.0001


def test_what_is_said_greedily_is_scored_with_the_same_numbers(client):
    said = complete(client, TEXT, logprobs=5, max_tokens=20)
    spoken = said.choices[0].logprobs
    again = complete(client, TEXT + said.choices[0].text, echo=True, logprobs=5, max_tokens=0).choices[0]
    assert again.text == TEXT + said.choices[0].text and again.finish_reason == "length"
    scores = again.logprobs
    # The same bits, whether a token was computed alone or with its whole prompt.
    assert scores.tokens[-len(spoken.tokens):] == spoken.tokens
    assert scores.token_logprobs[-len(spoken.tokens):] == spoken.token_logprobs
    assert scores.top_logprobs[-len(spoken.tokens):] == spoken.top_logprobs
    assert all(max(top.values()) == logprob for top, logprob in zip(spoken.top_logprobs, spoken.token_logprobs))


def test_lm_evals_log_likelihood_is_the_probability_of_the_continuation(client):
    """As lm-eval's `local-completions` asks and sums, with a context and two continuations in one request."""
    context = "Question: What do bees make?\nAnswer:"
    whole = [context + " honey", context + " granite"]
    prompt_tokens = complete(client, context).usage.prompt_tokens
    answer = complete(client, whole, echo=True, logprobs=1, max_tokens=1, seed=1234)
    likelihoods = []
    for choice in sorted(answer.choices, key=lambda choice: choice.index):
        logprobs = choice.logprobs
        likelihoods.append(sum(logprobs.token_logprobs[prompt_tokens:-1]))
        assert "".join(logprobs.tokens[prompt_tokens:-1]) in (" honey", " granite")
    assert likelihoods[0] > likelihoods[1]


def test_chunks_join_to_the_whole_answer(client):
    fields = {"echo": True, "logprobs": 1, "n": 2, "temperature": 0.8, "seed": 5, "max_tokens": 12}
    whole = complete(client, [TEXT, "Once"], **fields)
    texts, tokens, finished, usage = {}, {}, {}, None
    for chunk in complete(client, [TEXT, "Once"], stream=True, stream_options={"include_usage": True}, **fields):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens)
            finished[choice.index] = choice.finish_reason or finished.get(choice.index)
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert tokens == {choice.index: choice.logprobs.tokens for choice in whole.choices}
    assert finished == {choice.index: choice.finish_reason for choice in whole.choices}
    assert len(texts) == 4 and texts[0] != texts[1]
    assert usage.total_tokens == whole.usage.total_tokens


def test_text_that_comes_again_is_not_computed_again(client):
    text = "A story about a dormouse who slept all winter. " * 8
    first = complete(client, text)
    again = complete(client, text + first.choices[0].text + " And then")
    assert again.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1


def test_nothing_of_it_stays_as_a_session(client, server):
    before = len(server.get("/v1/sessions", implicit="true", limit=100)["data"])
    complete(client, "Gone tomorrow")
    assert len(server.get("/v1/sessions", implicit="true", limit=100)["data"]) == before


def test_wrong_requests_are_refused_by_the_name_of_their_field(client):
    def refused(prompt="x", **fields):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(client, prompt, **fields)
        return caught.value

    assert refused(suffix="end").param == "suffix"
    assert refused(best_of=3).param == "best_of"
    assert refused(logprobs=6).param == "logprobs"
    assert refused([]).param == "prompt"
    assert refused("").param == "prompt"
    assert refused([[1, 2], [10**6]]).param == "prompt[1][0]"
    assert refused("word " * 9000).code == "context_length_exceeded"
    assert refused("word " * 9000).param == "prompt"
