"""Clients that know nothing of sessions and send their whole history again and again."""

import pytest

SYSTEM = {"role": "system", "content": "You are a patient teacher of geography. " * 8}


@pytest.fixture
def chat(start):
    server = start()

    def chat(messages, **fields):
        fields = {"temperature": 0.8, "seed": 5, "max_tokens": 40, **fields}
        answer = server.post("/v1/chat/completions", {"messages": messages, **fields})
        usage, receipt = answer["usage"], answer["dormouse"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == receipt["restored_tokens"]
        return answer["choices"][0]["message"], usage, receipt

    chat.server = server
    return chat


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize("restarted", [False, True], ids=["same-process", "after-kill-9"])
def test_a_history_sent_again_is_computed_only_where_it_is_new(chat, restarted):
    messages = [SYSTEM, user("Where is Ghana?")]
    for question in ("And Togo?", "And Benin?"):
        answer, usage, _ = chat(messages)
        known = usage["total_tokens"]
        messages += [{"role": "assistant", "content": answer["content"]}, user(question)]
        if restarted:
            chat.server.restart()
        _, usage, receipt = chat(messages, max_tokens=1)
        # The last generated token was sampled but never read by the model: it is the only one without KV.
        assert receipt["restored_tokens"] >= known - 1, (usage, receipt)
        assert receipt["recomputed_tokens"] == 0
        new = usage["prompt_tokens"] - receipt["restored_tokens"]
        assert new < 25, (usage, receipt)


def test_text_whose_tokens_differ_when_read_again_is_still_recognised(chat):
    # At this temperature the model says words in tokens that a tokenizer would never choose.
    messages = [user("Invent strange words.")]
    for seed in range(4):
        answer, usage, _ = chat(messages, temperature=2.0, seed=seed, max_tokens=30)
        messages += [{"role": "assistant", "content": answer["content"]}, user("More.")]
        _, after, receipt = chat(messages, max_tokens=1)
        assert receipt["restored_tokens"] >= usage["total_tokens"] - 1, (usage, after, receipt)


def test_histories_that_part_share_what_they_have_in_common(chat):
    first = [SYSTEM, user("Where is Ghana?")]
    answer, _, _ = chat(first)
    history = [*first, {"role": "assistant", "content": answer["content"]}]
    _, one, _ = chat([*history, user("Which rivers are there?")], max_tokens=1)
    _, usage, receipt = chat([*history, user("What do people eat there?")], max_tokens=1)
    # All that was said before is there; only the question is new, and that is no miss.
    assert one["prompt_tokens"] - 20 <= receipt["restored_tokens"] < usage["prompt_tokens"]
    assert "miss" not in receipt

    changed = [*first, {"role": "assistant", "content": "I will not say."}, user("Why?")]
    _, usage, receipt = chat(changed, max_tokens=1)
    assert 60 < receipt["restored_tokens"] < usage["prompt_tokens"]
    assert receipt["miss"]["reason"] and receipt["miss"]["at_message"] >= 1


def test_reused_pages_give_the_same_tokens_as_a_fresh_server(chat, start):
    # The fresh server reads the answer as text. Where that has other tokens than were sampled, the two are asked
    # different questions, and nothing can be compared: then another answer is tried.
    for seed in range(20):
        messages = [SYSTEM, user("Where is Ghana?")]
        answer, _, _ = chat(messages, seed=seed)
        messages += [{"role": "assistant", "content": answer["content"]}, user("And Togo?")]
        reused, usage, receipt = chat(messages, temperature=0)
        assert receipt["restored_tokens"] > 0
        fresh_server = start()
        fresh = fresh_server.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 40})
        fresh_server.close()
        assert fresh["dormouse"]["restored_tokens"] == 0
        if fresh["usage"]["prompt_tokens"] == usage["prompt_tokens"]:
            break
    assert fresh["usage"]["prompt_tokens"] == usage["prompt_tokens"], "every sampled answer reads differently"
    assert fresh["choices"][0]["message"]["content"] == reused["content"]


def test_an_answer_that_is_not_to_be_stored_leaves_no_session(chat):
    before = chat.server.get("/v1/sessions", implicit="true")["data"]
    chat([user("Hello!")], store=False, max_tokens=3)
    chat.server.http.get("/health")
    assert chat.server.get("/v1/sessions", implicit="true")["data"] == before
