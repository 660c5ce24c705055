"""`/v1/responses` through the unmodified `openai` client: chains, background, streams that go on after anything."""

import json
import threading

import httpx
import openai
import pydantic
import pytest

import harness

QUESTION = "Name three colours and say one thing about each of them."
# Answers of a known length, so that there is something to resume, to cancel and to kill.
STEADY = {"temperature": 0, "extra_body": {"ignore_eos": True}}
TERMINAL = ("response.completed", "response.incomplete", "response.failed")


@pytest.fixture
def ask(client):
    return asker(client)


def asker(client):
    model = client.models.list().data[0].id

    def ask(input=QUESTION, **fields):
        fields = {"model": model, "max_output_tokens": 16, "temperature": 0, **fields}
        return client.responses.create(input=input, **fields)

    return ask


def text_of(events):
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def raw_events(server, response, starting_after=None):
    """The frames of a response's stream as they came."""
    params = {"stream": "true"}
    if starting_after is not None:
        params["starting_after"] = starting_after
    return list(server._stream("GET", f"/v1/responses/{response}", params=params))


def without_times(event):
    """An event without what a receipt measured."""
    event = dict(event)
    if "response" in event:
        event["response"] = {
            key: value
            for key, value in event["response"].items()
            if key not in ("dormouse", "usage", "completed_at", "prompt_cache_diagnostics")
        }
    return event


def assert_whole(events):
    """Numbered without gaps from 0, begun and ended once, and the deltas join to what is done."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created" and events[-1]["type"] in TERMINAL
    said = {}
    for event in events:
        if event["type"].endswith(".delta"):
            said[event["item_id"]] = said.get(event["item_id"], "") + event["delta"]
    for item in events[-1]["response"]["output"]:
        whole = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert said.get(item["id"], "") == whole


def test_a_response_is_answered_stored_and_retrieved(client, ask):
    response = ask(metadata={"topic": "colours"}, instructions="Answer briefly.", user="me")
    assert response.id.startswith("resp_") and len(response.id) == len("resp_") + 32
    assert response.object == "response" and response.output_text
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == 16
    assert response.usage.total_tokens == response.usage.input_tokens + 16
    assert response.metadata == {"topic": "colours"} and response.instructions == "Answer briefly."
    assert response.model_extra["dormouse"]["exact"] is True
    assert client.responses.retrieve(response.id) == response
    done = ask("Say yes.", max_output_tokens=400)
    assert done.status == "completed" and done.completed_at >= done.created_at


def test_a_stream_has_every_event_in_order_and_says_the_same_as_the_whole_answer(client, ask, server):
    whole = ask()
    events = list(ask(stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert text_of(events) == whole.output_text == events[-1].response.output_text
    # Asked again later: the same bytes under the same numbers.
    again = raw_events(server, events[-1].response.id)
    assert_whole(again)
    assert [event["type"] for event in again] == kinds
    tail = raw_events(server, events[-1].response.id, starting_after=6)
    assert [event.raw for event in tail] == [event.raw for event in again[7:]]


def test_the_clients_own_stream_helper_is_satisfied(client):
    model = client.models.list().data[0].id
    with client.responses.stream(model=model, input="Say yes.", temperature=0, max_output_tokens=400) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.status == "completed"
    with client.responses.stream(response_id=final.id, starting_after=4) as stream:
        events = list(stream)
        assert stream.get_final_response().output_text == final.output_text
    assert all(event.sequence_number > 4 for event in events)


def test_a_chain_reads_nothing_twice_and_branches_leave_each_other_alone(client, ask):
    first = ask()
    second = ask("And a fourth?", previous_response_id=first.id)
    known = first.usage.input_tokens + first.usage.output_tokens
    # The last sampled token has no KV yet when a turn ends.
    assert known - 1 <= second.usage.input_tokens_details.cached_tokens < second.usage.input_tokens
    assert second.previous_response_id == first.id
    assert second.prompt_cache_diagnostics.type == "cache_hit"
    # Two branches of one response; the same question has the same answer, in whatever branch it is asked.
    other = ask("Now name three animals.", previous_response_id=first.id)
    again = ask("And a fourth?", previous_response_id=first.id)
    assert again.output_text == second.output_text != other.output_text
    assert client.responses.retrieve(first.id) == first
    third = ask("Thanks.", previous_response_id=second.id)
    assert third.usage.input_tokens_details.cached_tokens >= second.usage.total_tokens - 1


def test_instructions_are_not_inherited(ask, client):
    first = ask(instructions="You speak like a pirate.")
    same = ask("Go on.", previous_response_id=first.id, instructions="You speak like a pirate.")
    assert same.prompt_cache_diagnostics.type == "cache_hit"
    without = ask("Go on.", previous_response_id=first.id)
    assert without.instructions is None and without.usage.input_tokens != same.usage.input_tokens
    miss = without.prompt_cache_diagnostics
    assert miss.type == "cache_miss" and miss.reason == "input_changed"
    assert miss.cache_missed_tokens == without.usage.input_tokens - without.usage.input_tokens_details.cached_tokens
    assert miss.model_extra["dormouse"]["reason"] == "instructions_changed"
    assert miss.model_extra["dormouse"]["at_token"] == without.usage.input_tokens_details.cached_tokens
    # What was said stays known: only the system message is another.
    listed = client.responses.input_items.list(without.id, order="asc").data
    assert [item.role for item in listed] == ["user", "assistant", "user"]


def test_a_client_that_sends_its_whole_history_finds_it_known(ask):
    first = ask()
    history = [{"role": "user", "content": QUESTION}, *[item.to_dict() for item in first.output]]
    second = ask([*history, {"role": "user", "content": "And a fourth?"}])
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    assert second.output_text == ask("And a fourth?", previous_response_id=first.id).output_text


def test_an_item_can_be_named_by_its_id(ask):
    first = ask()
    reference = {"type": "item_reference", "id": first.output[0].id}
    named = ask([{"role": "user", "content": QUESTION}, reference, {"role": "user", "content": "And a fourth?"}])
    assert named.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    with pytest.raises(openai.NotFoundError) as caught:
        ask([{"type": "item_reference", "id": "msg_0123"}])
    assert caught.value.param == "input[0].id"


def test_input_items_are_listed_in_pages(client, ask):
    items = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "One."},
             {"role": "assistant", "content": "Two."}, {"role": "user", "content": "Three."}]
    response = ask(items)
    newest = client.responses.input_items.list(response.id, limit=3)
    assert [item.content[0].text for item in newest.data] == ["Three.", "Two.", "One."] and newest.has_more
    rest = client.responses.input_items.list(response.id, limit=3, after=newest.data[-1].id)
    assert [item.role for item in rest.data] == ["system"] and not rest.has_more
    assert len(list(client.responses.input_items.list(response.id, limit=1))) == 4
    ascending = client.responses.input_items.list(response.id, order="asc")
    assert [item.content[0].text for item in ascending.data] == ["Be kind.", "One.", "Two.", "Three."]


def test_input_tokens_are_counted_without_generating(client, ask):
    model = client.models.list().data[0].id
    count = client.responses.input_tokens.count(model=model, input=QUESTION, instructions="Be brief.")
    first = ask(instructions="Be brief.")
    assert count.input_tokens == first.usage.input_tokens and count.object == "response.input_tokens"
    follow = {"input": "And a fourth?", "previous_response_id": first.id, "instructions": "Be brief."}
    count = client.responses.input_tokens.count(model=model, **follow)
    assert count.input_tokens == ask(**follow).usage.input_tokens


def test_a_response_that_is_not_stored_cannot_be_asked_for(client, ask, server):
    response = ask(store=False)
    assert response.output_text and response.model_extra["store"] is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError) as caught:
        ask("Go on.", previous_response_id=response.id)
    assert caught.value.param == "previous_response_id"
    session = response.model_extra["dormouse"]["session"]
    harness.wait_until(lambda: server.http.get(f"/v1/sessions/{session}").status_code == 404, "its session is deleted")


def test_deleting_a_response_leaves_those_that_follow_it(client, ask, server):
    first = ask()
    second = ask("And a fourth?", previous_response_id=first.id)
    session = first.model_extra["dormouse"]["session"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    assert server.http.get(f"/v1/sessions/{session}").status_code == 404
    third = ask("Thanks.", previous_response_id=second.id)
    assert third.usage.input_tokens_details.cached_tokens >= second.usage.total_tokens - 1
    # And a session's end is the end of its response.
    server.http.delete(f"/v1/sessions/{second.model_extra['dormouse']['session']}")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)


def test_a_background_response_is_polled(client, ask):
    begun = ask(background=True, **STEADY)
    assert begun.status in ("queued", "in_progress") and begun.background is True and begun.usage is None
    done = harness.wait_until(lambda: finished(client, begun.id), "the background response ends")
    assert done.status == "incomplete" and done.usage.output_tokens == 16 and done.output_text


def finished(client, response):
    found = client.responses.retrieve(response)
    return found if found.status not in ("queued", "in_progress") else None


def test_a_background_response_is_cancelled(client, ask):
    begun = ask(background=True, max_output_tokens=4000, **STEADY)
    harness.wait_until(lambda: client.responses.retrieve(begun.id).output_text, "the first words")
    cancelled = client.responses.cancel(begun.id)
    assert cancelled.status == "cancelled"
    assert client.responses.cancel(begun.id).status == "cancelled"
    again = client.responses.retrieve(begun.id)
    assert again.status == "cancelled" and again.output[0].status == "incomplete"
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(ask().id)


def test_a_stream_is_left_and_taken_up_again(client, ask, server):
    stream = ask(stream=True, background=True, max_output_tokens=60, **STEADY)
    seen = [next(stream) for _ in range(12)]
    stream.close()
    assert [event.type for event in seen[:3]] == ["response.created", "response.queued", "response.in_progress"]
    response = seen[0].response.id
    rest = list(client.responses.retrieve(response, stream=True, starting_after=seen[-1].sequence_number))
    numbers = [event.sequence_number for event in seen + rest]
    assert numbers == list(range(len(numbers))) and rest[-1].type == "response.incomplete"
    assert text_of(seen + rest) == rest[-1].response.output_text
    assert_whole(raw_events(server, response))


def test_a_response_whose_client_leaves_is_cancelled_and_its_conversation_is_free(client, ask):
    """As the stop button of a chat, or a client's timeout, leaves it."""
    conversation = client.conversations.create()
    stream = ask(stream=True, conversation=conversation.id, max_output_tokens=400, **STEADY)
    seen = [next(stream) for _ in range(9)]
    stream.close()
    response = seen[0].response.id
    ended = harness.wait_until(
        lambda: (found := client.responses.retrieve(response)).status != "in_progress" and found, "its end"
    )
    assert ended.status == "cancelled" and ended.output_text.startswith(text_of(seen))
    assert ask("Thanks.", conversation=conversation.id, max_output_tokens=4, **STEADY).usage.output_tokens == 4


def test_a_killed_server_goes_on_with_the_stream_and_tells_the_same_events(start, dice):
    server = start()
    ask = asker(server.openai())
    fields = {"max_output_tokens": 60, "stream": True, "extra_body": {"ignore_eos": True, "seed": 7}, "temperature": 0.8}
    reference = list(ask(**fields))
    expected = raw_events(server, reference[-1].response.id)
    assert_whole(expected)
    for point in sorted(dice.sample(range(3, 50), 3)):
        seen = []

        def listen(stream):
            try:
                for event in stream:
                    seen.append(event)
            except (httpx.HTTPError, openai.APIError):
                pass

        listener = threading.Thread(target=listen, args=(ask(**fields),), daemon=True)
        listener.start()
        harness.wait_until(lambda: len(seen) > point, "the stream's events")
        server.kill()
        listener.join()
        server.start()
        ask = asker(server.openai())
        response = seen[0].response.id
        rest = raw_events(server, response, starting_after=seen[-1].sequence_number)
        whole = raw_events(server, response)
        assert_whole(whole)
        assert [event.raw for event in rest] == [event.raw for event in whole[len(seen) :]]
        told = [event.to_dict() for event in seen] + [dict(event) for event in rest]
        mine, theirs = whole[0]["response"]["id"], expected[0]["response"]["id"]
        assert [event["sequence_number"] for event in told] == list(range(len(expected)))
        for one, other in zip(whole, expected):
            assert one["type"] == other["type"] and one.get("delta") == other.get("delta")
        assert mine != theirs
        assert server.get(f"/v1/responses/{response}")["status"] == "incomplete"


def test_a_call_killed_in_the_middle_is_told_on_and_is_still_valid(start, dice):
    server = start()
    fields = {"tools": TOOLS, "tool_choice": "required", "max_output_tokens": 200, "stream": True,
              "input": "What is the weather in Paris?", "extra_body": {"seed": 3}, "temperature": 0.9}
    whole = [event.to_dict() for event in asker(server.openai())(**fields)]
    for point in sorted(dice.sample(range(3, len(whole) - 5), 2)):
        stream = asker(server.openai())(**fields)
        seen = [next(stream).to_dict() for _ in range(point)]
        server.kill()
        server.start()
        rest = raw_events(server, seen[0]["response"]["id"], starting_after=seen[-1]["sequence_number"])
        assert [event["sequence_number"] for event in seen + rest] == list(range(len(whole)))
        for one, other in zip(seen + rest, whole):
            assert one["type"] == other["type"] and one.get("delta") == other.get("delta")
        call = next(item for item in rest[-1]["response"]["output"] if item["type"] == "function_call")
        assert set(json.loads(call["arguments"])) == {"city"}


def test_another_model_answers_in_the_same_chain(start, tmp_path):
    # One bit of the weights is another: a model that speaks as well, and is not the same.
    other = tmp_path / "Other.gguf"
    weights = bytearray(harness.MODEL.read_bytes())
    weights[-1] ^= 1
    other.write_bytes(weights)
    server = start(flags=["--model", other])
    client = server.openai()
    ask = asker(client)
    first = ask("My name is Ada. Say hello.")
    switched = ask("What is my name?", previous_response_id=first.id, model=other.stem)
    assert switched.model == other.stem and switched.output_text
    assert switched.prompt_cache_diagnostics.reason == "model_changed"
    back = ask("And again?", previous_response_id=switched.id)
    assert back.model == first.model and back.output_text
    assert [item.role for item in client.responses.input_items.list(back.id, order="asc")] == [
        "user", "assistant", "user", "assistant", "user"]
    # A conversation is the model's that answered in it first.
    conversation = client.conversations.create()
    ask("Hello!", conversation=conversation.id, model=other.stem)
    with pytest.raises(openai.BadRequestError) as caught:
        ask("Hello!", conversation=conversation.id)
    assert caught.value.param == "model"


def test_a_prompt_is_compared_with_another_ones(ask):
    first = ask(instructions="You are a helpful assistant. " * 20)
    def compared(**fields):
        return ask(extra_body={"prompt_cache_options": {"comparison_response_id": fields.pop("with_id", first.id)}},
                   **fields).prompt_cache_diagnostics
    assert compared(instructions="You are a helpful assistant. " * 20).type == "cache_hit"
    miss = compared(instructions="Something else entirely.")
    assert miss.type == "cache_miss" and miss.reason == "input_changed"
    assert compared(with_id="resp_none").type == "comparison_response_not_found"


def test_responses_outlive_the_server(start):
    server = start()
    client = server.openai()
    ask = asker(client)
    first = ask(instructions="Be brief.", metadata={"a": "b"})
    events = [event.raw for event in raw_events(server, first.id)]
    server.stop()
    server.start()
    client = server.openai()
    assert client.responses.retrieve(first.id) == first
    assert [event.raw for event in raw_events(server, first.id)] == events
    second = asker(client)("And a fourth?", previous_response_id=first.id, instructions="Be brief.")
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1


def test_a_prompt_that_does_not_fit_is_refused_or_shortened(start):
    server = start(flags=["--ctx", "256"])
    client = server.openai()
    ask = asker(client)
    history = []
    for number in range(12):
        history += [{"role": "user", "content": f"Remember the number {number}, and that it is a nice number."},
                    {"role": "assistant", "content": f"I will remember the number {number}."}]
    history.append({"role": "user", "content": "Which numbers were there?"})
    with pytest.raises(openai.BadRequestError) as caught:
        ask(history)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "input"
    assert "256" in caught.value.message
    short = ask(history, truncation="auto", instructions="Be brief.")
    assert short.truncation == "auto" and short.output_text
    assert short.usage.input_tokens + 16 <= 256
    # Nothing was cut in the middle of a message, and as much as fits is there.
    longer = client.responses.input_tokens.count(model=short.model, input=history[-13:], instructions="Be brief.")
    assert longer.input_tokens + 16 > 256 or short.usage.input_tokens >= longer.input_tokens
    # What can never fit is not even looked at whole.
    huge = [{"role": "user", "content": "word " * 200_000}, *history[-3:]]
    assert ask(huge, truncation="auto").usage.input_tokens + 16 <= 256
    with pytest.raises(openai.BadRequestError) as caught:
        ask(huge[:1], truncation="auto")
    assert caught.value.code == "context_length_exceeded"
    # A chain that grows beyond the context is shortened as well.
    follow = ask("And which was the last one?", previous_response_id=short.id, truncation="auto", max_output_tokens=40)
    assert follow.usage.input_tokens + 40 <= 256 and follow.output_text


def test_a_structured_answer_is_parsed(client):
    class Colour(pydantic.BaseModel):
        name: str
        is_warm: bool

    model = client.models.list().data[0].id
    response = client.responses.parse(model=model, input="Describe red.", text_format=Colour, temperature=0,
                                      max_output_tokens=100)
    assert response.status == "completed" and isinstance(response.output_parsed, Colour)
    assert response.text.format.type == "json_schema"


TOOLS = [{
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}},
                   "required": ["city"], "additionalProperties": False},
    "strict": True,
}]


def test_a_tool_is_called_and_its_output_goes_on_in_the_chain(client, ask, server):
    fields = {"tools": TOOLS, "tool_choice": "required", "max_output_tokens": 200, "parallel_tool_calls": False}
    question = "What is the weather in Paris?"
    called = ask(question, **fields)
    call = next(item for item in called.output if item.type == "function_call")
    assert call.name == "get_weather" and '"city"' in call.arguments
    assert called.tools[0].name == "get_weather" and called.tool_choice == "required"
    streamed = list(ask(question, stream=True, **fields))
    fragments = [event.delta for event in streamed if event.type == "response.function_call_arguments.delta"]
    assert "".join(fragments) == call.arguments
    done = next(event for event in streamed if event.type == "response.function_call_arguments.done")
    assert done.arguments == call.arguments
    assert_whole(raw_events(server, streamed[-1].response.id))
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny, 21 degrees"}
    answer = ask([output], previous_response_id=called.id, tools=TOOLS)
    assert answer.usage.input_tokens_details.cached_tokens >= called.usage.total_tokens - 1
    # A client that keeps the history itself is as well off.
    history = [{"role": "user", "content": question}, *[item.to_dict() for item in called.output], output]
    whole = ask(history, tools=TOOLS)
    assert whole.usage.input_tokens_details.cached_tokens >= called.usage.total_tokens - 1
    assert whole.output_text == answer.output_text
    listed = client.responses.input_items.list(answer.id, order="asc").data
    assert [item.type for item in listed][-2:] == ["function_call", "function_call_output"]
    without = ask([output], previous_response_id=called.id)
    assert without.prompt_cache_diagnostics.reason == "tools_changed"


def test_log_probabilities_come_with_the_answer(ask):
    response = ask(include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = response.output[0].content[0].logprobs
    assert len(logprobs) == response.usage.output_tokens and all(len(it.top_logprobs) == 2 for it in logprobs)
    assert response.top_logprobs == 2
    joined = b"".join(bytes(it.bytes) for it in logprobs).decode()
    assert joined == response.output_text


@pytest.mark.parametrize("fields, param", [
    ({"input": []}, "input"),
    ({"input": "hi", "tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"input": "hi", "previous_response_id": "resp_1", "conversation": "conv_1"}, "previous_response_id"),
    ({"input": "hi", "background": True, "store": False}, "background"),
    ({"input": "hi", "prompt": {"id": "p"}}, "prompt"),
    ({"input": [{"type": "image_generation_call"}]}, "input[0].type"),
    ({"input": "hi", "metadata": {str(key): "" for key in range(17)}}, "metadata"),
])
def test_what_cannot_be_done_is_refused_by_name(server, fields, param):
    answer = server.http.post("/v1/responses", json=fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


@pytest.mark.parametrize("method, path", [
    ("GET", "/v1/responses/resp_0"), ("DELETE", "/v1/responses/resp_0"), ("POST", "/v1/responses/resp_0/cancel"),
    ("GET", "/v1/responses/resp_0/input_items"), ("GET", "/v1/responses/resp_0?stream=true"),
    ("GET", "/v1/conversations/conv_0"), ("DELETE", "/v1/conversations/conv_0"),
    ("GET", "/v1/conversations/conv_0/items"), ("GET", "/v1/conversations/conv_0/items/msg_0"),
])
def test_what_is_not_there_is_a_404(server, method, path):
    answer = server.http.request(method, path)
    assert answer.status_code == 404 and answer.json()["error"]["code"].endswith("_not_found")
