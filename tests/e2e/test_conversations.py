"""`/v1/conversations` through the unmodified `openai` client: sessions under OpenAI's name."""

import openai
import pytest


@pytest.fixture
def ask(client):
    model = client.models.list().data[0].id

    def ask(input, **fields):
        return client.responses.create(input=input, **{"model": model, "max_output_tokens": 16, "temperature": 0, **fields})

    return ask


def texts(client, conversation):
    items = client.conversations.items.list(conversation, order="asc", limit=100).data
    return [item.content[0].text for item in items]


def test_a_conversation_is_created_changed_and_deleted(client, server):
    conversation = client.conversations.create(metadata={"topic": "demo"})
    assert conversation.id.startswith("conv_") and conversation.object == "conversation"
    assert conversation.metadata == {"topic": "demo"}
    changed = client.conversations.update(conversation.id, metadata={"topic": "other"})
    assert changed.metadata == {"topic": "other"}
    assert client.conversations.retrieve(conversation.id) == changed
    # The same object through the other door.
    session = conversation.id.replace("conv_", "sess_")
    assert server.session(session)["metadata"] == {"topic": "other"}
    deleted = client.conversations.delete(conversation.id)
    assert deleted.deleted is True and deleted.object == "conversation.deleted"
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(conversation.id)
    assert server.http.get(f"/v1/sessions/{session}").status_code == 404


def test_responses_add_to_a_conversation_and_read_nothing_twice(client, ask, server):
    conversation = client.conversations.create(items=[{"role": "user", "content": "My name is Ada."},
                                                      {"role": "assistant", "content": "Hello, Ada!"}])
    first = ask("What is my name?", conversation=conversation.id)
    assert first.conversation.id == conversation.id
    second = ask("Are you sure?", conversation={"id": conversation.id})
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    assert texts(client, conversation.id) == ["My name is Ada.", "Hello, Ada!", "What is my name?", first.output_text,
                                              "Are you sure?", second.output_text]
    # The items of a response are those of the conversation, with their ids.
    items = client.conversations.items.list(conversation.id, order="asc").data
    assert items[3].id == first.output[0].id
    assert client.conversations.items.retrieve(items[3].id, conversation_id=conversation.id) == items[3]
    assert [item.id for item in client.responses.input_items.list(second.id, order="asc")] == [it.id for it in items[:5]]
    # A branch of it leaves it as it is, and goes on after its first answer.
    branch = ask("Are you sure?", previous_response_id=first.id)
    assert branch.output_text == second.output_text
    assert len(texts(client, conversation.id)) == 6
    # A session's turn goes on in it, too.
    turn = server.turn(conversation.id.replace("conv_", "sess_"), "Thanks.", max_tokens=8, temperature=0)
    assert turn["usage"]["cached_tokens"] >= second.usage.total_tokens - 1
    assert len(texts(client, conversation.id)) == 8
    client.responses.delete(second.id)
    assert len(texts(client, conversation.id)) == 8


def test_a_responses_session_that_becomes_a_conversation_outlives_the_response(client, ask, server):
    first = ask("Hello!")
    session = first.model_extra["dormouse"]["session"]
    second = ask("And again.", conversation=session.replace("sess_", "conv_"))
    client.responses.delete(first.id)
    assert client.responses.retrieve(second.id) == second
    assert server.session(session)["turns"] == 2


def test_instructions_hold_for_one_response(client, ask):
    conversation = client.conversations.create()
    first = ask("Hello!", conversation=conversation.id, instructions="You are a pirate.")
    second = ask("And again.", conversation=conversation.id, instructions="You are a pirate.")
    assert second.prompt_cache_diagnostics.type == "cache_hit"
    third = ask("And again.", conversation=conversation.id)
    assert third.prompt_cache_diagnostics.type == "cache_miss"
    # The events of an earlier response are told as before, though the log has been written anew.
    events = list(client.responses.retrieve(first.id, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1 and "".join(deltas) == first.output_text


def test_a_sessions_own_instructions_come_back_after_a_response_with_others(ask, server):
    session = server.create(instructions="You speak like a pirate.")
    conversation = session.replace("sess_", "conv_")
    own = ask("Hello!", conversation=conversation)
    other = ask("And again.", conversation=conversation, instructions="You are a robot.")
    assert other.prompt_cache_diagnostics.type == "cache_miss"
    assert server.session(session)["instructions"] == "You speak like a pirate."
    turn = server.turn(session, "And again.", max_tokens=8, temperature=0)
    assert turn["dormouse"]["miss"]["reason"] == "instructions_changed"
    turn = server.turn(session, "And again.", max_tokens=8, temperature=0)
    assert "miss" not in turn["dormouse"] and own.output_text


def test_items_are_added_and_deleted_by_hand(client, ask):
    conversation = client.conversations.create()
    ask("Hello!", conversation=conversation.id)
    added = client.conversations.items.create(conversation.id, items=[
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "The word is swordfish."}]},
        {"type": "message", "role": "assistant", "content": "Noted."}])
    assert [item.content[0].text for item in added.data] == ["The word is swordfish.", "Noted."]
    told = ask("Which word?", conversation=conversation.id)
    before = texts(client, conversation.id)
    # An item in the middle: what follows it is computed again, with the next response.
    left = client.conversations.items.delete(added.data[0].id, conversation_id=conversation.id)
    assert left.id == conversation.id
    assert texts(client, conversation.id) == before[:2] + before[3:]
    again = ask("Which word?", conversation=conversation.id)
    listed = texts(client, conversation.id)
    assert listed == before[:2] + before[3:] + ["Which word?", again.output_text]
    # It answers as a conversation does that never held the item.
    roles = ["user", "assistant", "assistant", "user", "assistant", "user"]
    fresh = client.conversations.create(items=[{"role": role, "content": text} for role, text in zip(roles, listed[:-2])])
    assert ask("Which word?", conversation=fresh.id).output_text == again.output_text
    with pytest.raises(openai.NotFoundError):
        client.conversations.items.delete(added.data[0].id, conversation_id=conversation.id)
    assert client.responses.retrieve(told.id).output_text == told.output_text


def test_a_conversation_has_one_writer(client, ask):
    conversation = client.conversations.create()
    running = ask("Hello!", conversation=conversation.id, background=True, max_output_tokens=4000,
                  extra_body={"ignore_eos": True})
    with pytest.raises(openai.ConflictError):
        ask("Me too!", conversation=conversation.id)
    with pytest.raises(openai.ConflictError):
        client.conversations.items.create(conversation.id, items=[{"role": "user", "content": "x"}])
    client.responses.cancel(running.id)
    assert ask("Now me.", conversation=conversation.id).output_text


def test_wrong_items_are_refused_by_name(client):
    conversation = client.conversations.create()
    with pytest.raises(openai.BadRequestError) as caught:
        client.conversations.items.create(conversation.id, items=[{"role": "user", "content": "x"}] * 21)
    assert caught.value.param == "items"
    with pytest.raises(openai.BadRequestError) as caught:
        client.conversations.create(items=[{"type": "computer_call"}])
    assert caught.value.param == "items[0].type"
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="smollm2", input="hi", conversation="conv_none")
    assert caught.value.code in ("conversation_not_found", "model_not_found")
