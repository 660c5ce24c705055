"""The unmodified `openai` client against the real server."""

import math

import openai
import pytest

QUESTION = [{"role": "user", "content": "Name three colours and say one thing about each of them."}]


@pytest.fixture
def ask(client):
    def ask(messages=QUESTION, **fields):
        fields = {"model": client.models.list().data[0].id, "max_tokens": 24, "temperature": 0, **fields}
        return client.chat.completions.create(messages=messages, **fields)

    return ask


def text(answer, choice=0):
    return answer.choices[choice].message.content


def test_models_are_listed_and_shown_by_id(client):
    listed = client.models.list().data
    model = listed[0]
    assert model.id.startswith("SmolLM2") and model.object == "model"
    assert model.model_extra["dormouse"]["state"] == "loaded"
    # After what answers comes what could: the catalogue, none of which is in this data directory.
    known = {model.id: model.model_extra["dormouse"]["state"] for model in listed[1:]}
    assert known["smollm2"] == "known" and set(known.values()) == {"known"}
    assert client.models.retrieve("smollm2").model_extra["dormouse"]["loaded"] is False
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="smollm2", messages=QUESTION)
    assert "not loaded" in caught.value.message
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def test_a_chat_is_answered_with_usage_and_a_receipt(ask):
    answer = ask()
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant" and text(answer)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint
    receipt = answer.model_extra["dormouse"]
    assert receipt["restored_tokens"] == answer.usage.prompt_tokens_details.cached_tokens
    assert receipt["exact"] is True


def test_a_stream_says_the_same_as_the_whole_answer_and_ends_with_usage(ask):
    whole = ask()
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == text(whole)
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert finishes == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_include_usage_has_no_usage(ask):
    assert all(chunk.choices and chunk.usage is None for chunk in ask(stream=True, max_tokens=4))


def test_the_same_seed_says_the_same_and_another_seed_something_else(ask):
    first, again, other = (text(ask(temperature=1.2, seed=seed)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_a_stop_string_ends_the_answer_before_itself(ask):
    whole = text(ask())
    # From the middle of one word to the middle of another: no token is that string.
    middle = len(whole) // 2
    stop = whole[middle - 4 : middle + 5]
    for stream in (False, True):
        if stream:
            chunks = [chunk.choices[0] for chunk in ask(stop=[stop, "never said"], stream=True)]
            said, finish = "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason
        else:
            answer = ask(stop=stop)
            said, finish = text(answer), answer.choices[0].finish_reason
        assert said == whole[: whole.index(stop)]
        assert finish == "stop"


def test_max_tokens_ends_the_answer_by_length(ask):
    for field in ("max_tokens", "max_completion_tokens"):
        answer = ask(**{"max_tokens": openai.omit, field: 5})
        assert answer.usage.completion_tokens == 5
        assert answer.choices[0].finish_reason == "length"


def test_several_choices_are_independent_and_reproducible(ask):
    answer = ask(n=2, temperature=1.2, seed=3, max_tokens=12)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert text(answer, 0) != text(answer, 1)
    assert answer.usage.completion_tokens <= 24
    again = ask(n=2, temperature=1.2, seed=3, max_tokens=12)
    assert [text(again, 0), text(again, 1)] == [text(answer, 0), text(answer, 1)]
    # A stream interleaves the choices and says the same.
    said = ["", ""]
    for chunk in ask(n=2, temperature=1.2, seed=3, max_tokens=12, stream=True):
        said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert said == [text(answer, 0), text(answer, 1)]


def test_logprobs_are_sorted_probabilities_of_the_tokens_that_were_said(ask):
    answer = ask(logprobs=True, top_logprobs=5, max_tokens=8)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert bytes(byte for token in content for byte in token.bytes).decode() == text(answer)
    for token in content:
        top = [entry.logprob for entry in token.top_logprobs]
        assert len(top) == 5 and top == sorted(top, reverse=True)
        assert sum(math.exp(logprob) for logprob in top) <= 1.0001
        # Greedy: the likeliest token was taken.
        assert token.logprob == top[0] and token.token == token.top_logprobs[0].token


def test_logprobs_without_alternatives_name_only_the_token(ask):
    content = ask(logprobs=True, max_tokens=3).choices[0].logprobs.content
    assert [token.top_logprobs for token in content] == [[], [], []]
    assert ask(max_tokens=3).choices[0].logprobs is None


def test_penalties_change_what_is_said(ask):
    repeat = [{"role": "user", "content": "Say the word yes again and again: yes yes yes yes yes yes"}]
    plain = text(ask(repeat))
    assert text(ask(repeat, frequency_penalty=2)) != plain
    assert text(ask(repeat, presence_penalty=2)) != plain
    assert text(ask(repeat, extra_body={"repetition_penalty": 1.8})) != plain


def test_a_biased_token_is_banned_or_forced(ask, server):
    session = server.create()
    first = next(event for event in server.stream_turn(session, QUESTION[0]["content"], temperature=0, max_tokens=2)
                 if "token" in event)
    plain = text(ask())
    assert plain.startswith(first["delta"])
    assert not text(ask(logit_bias={str(first["token"]): -100})).startswith(first["delta"])
    forced = ask(logit_bias={str(first["token"]): 100}, max_tokens=3)
    assert text(forced) == first["delta"] * 3


def test_a_session_in_the_body_needs_only_the_new_messages(ask, server):
    ask([{"role": "user", "content": "My name is Ada. Remember it."}], extra_body={"session": "ada"})
    before = server.session("ada")
    answer = ask([{"role": "user", "content": "What is my name?"}], extra_body={"session": "ada"})
    assert [item["message"]["role"] for item in server.items("ada")] == ["user", "assistant"] * 2
    receipt = answer.model_extra["dormouse"]
    assert receipt["session"] == before["id"]
    assert receipt["restored_tokens"] >= before["kv_tokens"] and receipt["recomputed_tokens"] == 0
    assert answer.usage.prompt_tokens > before["tokens"]


def test_an_unknown_model_is_a_not_found_error(ask):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(model="gpt-nonexistent")
    assert caught.value.code == "model_not_found" and "gpt-nonexistent" in caught.value.message


def test_an_unknown_session_id_is_a_not_found_error(ask):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(extra_body={"session": "sess_00000000000000000000000000000000"})
    assert caught.value.code == "session_not_found"


def test_a_prompt_longer_than_the_context_is_a_bad_request_with_both_numbers(ask):
    with pytest.raises(openai.BadRequestError) as caught:
        ask([{"role": "user", "content": "word " * 9000}])
    assert caught.value.code == "context_length_exceeded"
    assert "8192" in caught.value.message and "90" in caught.value.message
    assert caught.value.param == "messages"


def test_a_busy_session_is_a_conflict_error(ask, server):
    session = server.create()
    turn = server.begin(session, "Tell a long story.", max_tokens=2000, ignore_eos=True)
    with pytest.raises(openai.ConflictError) as caught:
        ask(extra_body={"session": session})
    assert turn in caught.value.message
    server.post(f"/v1/sessions/{session}/turns/{turn}/cancel")
    assert ask(extra_body={"session": session}, max_tokens=2).choices


def test_unsupported_meanings_are_refused_and_unknown_fields_ignored(ask):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(modalities=["text", "audio"])
    assert caught.value.param == "modalities"
    assert ask(extra_body={"something_new": {"a": 1}}, user="me", max_tokens=2).choices


def test_text_in_any_script_goes_in_and_comes_out_whole(ask):
    messages = [{"role": "user", "content": "Repeat exactly: 😀 žluťoučký 日本語 🏳️‍🌈 ñ"}]
    chunks = ask(messages, stream=True, max_tokens=40, temperature=1.5, seed=11)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == text(ask(messages, max_tokens=40, temperature=1.5, seed=11))
