"""Tool calls through the unmodified `openai` client and through sessions."""

import json
import threading

import httpx
import openai
import pytest

import harness
from harness import said

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "London", "Rome"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"],
                       "additionalProperties": False},
    },
}
NOTE = {
    "type": "function",
    "function": {
        "name": "write_note",
        "parameters": {"type": "object", "properties": {"text": {"type": "string", "minLength": 200, "maxLength": 400}},
                       "required": ["text"], "additionalProperties": False},
    },
}
TOOLS = [WEATHER, CLOCK]
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture
def ask(client):
    def ask(messages=QUESTION, **fields):
        model = client.models.list().data[0].id
        # One call unless a test wants several: so small a model begins another one after each.
        fields = {"model": model, "tools": TOOLS, "max_tokens": 200, "temperature": 0, "seed": 5,
                  "parallel_tool_calls": False, **fields}
        return client.chat.completions.create(messages=messages, **fields)

    return ask


def check(call):
    """The call is one of the tools, and its arguments are what the tool asks for."""
    arguments = json.loads(call.function.arguments)
    assert call.type == "function" and call.id.startswith("call_")
    match call.function.name:
        case "get_weather":
            assert arguments["city"] in ("Paris", "London", "Rome") and arguments["days"] in (1, 2, 3)
        case "clock":
            assert arguments["zone"] in ("UTC", "CET")
        case other:
            raise AssertionError(other)
    return call


def test_a_required_call_is_valid_json_for_its_tool(ask):
    choice = ask(tool_choice="required").choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    check(call)


def test_several_calls_in_one_answer_are_told_apart(ask):
    found = 0
    for seed in range(4):
        choice = ask(tool_choice="required", parallel_tool_calls=True, temperature=1.0, seed=seed).choices[0]
        calls = choice.message.tool_calls
        # The last one may have been cut off.
        for call in calls if choice.finish_reason == "tool_calls" else calls[:-1]:
            check(call)
        assert len({call.id for call in calls}) == len(calls)
        found = max(found, len(calls))
    assert found > 1


@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_is_valid_however_it_is_sampled(ask, seed):
    choice = ask(tool_choice="required", temperature=1.5, seed=seed).choices[0]
    (call,) = choice.message.tool_calls
    check(call)


@pytest.mark.parametrize("name", ["clock", "get_weather"])
def test_a_named_function_is_the_one_that_is_called(ask, name):
    for choice in ({"type": "function", "function": {"name": name}},
                   {"type": "allowed_tools", "allowed_tools": {
                       "mode": "required", "tools": [{"type": "function", "function": {"name": name}}]}}):
        calls = ask(tool_choice=choice).choices[0].message.tool_calls
        assert [check(call).function.name for call in calls] == [name]


def test_no_calls_are_made_where_none_are_wanted(ask):
    for fields in ({"tool_choice": "none"}, {"tools": openai.omit}):
        choice = ask(max_tokens=16, **fields).choices[0]
        assert choice.message.tool_calls is None and choice.message.content


def test_the_model_may_decide_and_is_understood_either_way(ask):
    choice = ask(tool_choice="auto", max_tokens=60).choices[0]
    if choice.message.tool_calls and choice.finish_reason == "tool_calls":
        for call in choice.message.tool_calls:
            check(call)
    else:
        assert choice.message.content


def test_a_stream_says_the_same_calls_as_the_whole_answer(ask):
    whole = ask(tool_choice="required")
    chunks = list(ask(tool_choice="required", stream=True, stream_options={"include_usage": True}))
    calls = {}
    for chunk in chunks:
        for choice in chunk.choices:
            assert not choice.delta.content
            for delta in choice.delta.tool_calls or []:
                if delta.index not in calls:
                    # The first delta of a call says what it is.
                    assert delta.id and delta.type == "function" and delta.function.name
                    calls[delta.index] = [delta.function.name, ""]
                else:
                    assert delta.id is None and delta.function.name is None
                calls[delta.index][1] += delta.function.arguments or ""
    expected = [[call.function.name, call.function.arguments] for call in whole.choices[0].message.tool_calls]
    assert [calls[index] for index in sorted(calls)] == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "tool_calls"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_clients_own_stream_helper_collects_the_calls(client):
    model = client.models.list().data[0].id
    with client.chat.completions.stream(
        model=model, messages=QUESTION, tools=TOOLS, tool_choice="required", temperature=0, max_tokens=200,
        parallel_tool_calls=False,
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds
    for call in final.choices[0].message.tool_calls:
        check(call)


def test_several_choices_call_each_for_itself(ask):
    answer = ask(tool_choice="required", n=2, temperature=1.0)
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls]
    assert len(answer.choices) == 2 and len(set(ids)) == len(ids)


def with_results(answer, question, rewrite=lambda message: message):
    """The conversation after an answer, as clients send it back, with a result for each call."""
    message = answer.choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": f"Result {index}: 21 degrees."}
               for index, call in enumerate(message.tool_calls)]
    return [rewrite(item) for item in [*question, message.model_dump(exclude_none=True), *results]]


def test_a_conversation_with_results_goes_on_from_what_is_computed(ask):
    question = [{"role": "user", "content": "How warm is it in London, and what time is it?"}]
    first = ask(question, tool_choice="required")
    second = ask(with_results(first, question), tool_choice="none", max_tokens=16)
    # All of the first turn but its last token, whose KV nobody needed yet.
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    assert second.choices[0].message.content
    third = ask([*with_results(first, question), {"role": "assistant", "content": second.choices[0].message.content},
                 {"role": "user", "content": "Thanks."}], tool_choice="none", max_tokens=4)
    assert third.usage.prompt_tokens_details.cached_tokens >= second.usage.total_tokens - 1


def test_a_client_that_writes_arguments_and_ids_anew_reuses_as_much(ask):
    question = [{"role": "user", "content": "Is it raining in Rome?"}]
    first = ask(question, tool_choice="required")

    def rewrite(message):
        message = json.loads(json.dumps(message).replace('"call_', '"toolu_'))
        for call in message.get("tool_calls", []):
            arguments = json.loads(call["function"]["arguments"])
            call["function"]["arguments"] = json.dumps(dict(reversed(arguments.items())), indent=2)
        return message

    second = ask(with_results(first, question, rewrite), tool_choice="none", max_tokens=4)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1


def test_an_unknown_history_with_calls_is_read_too(ask):
    call = {"id": "abc", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    history = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]},
               {"role": "tool", "tool_call_id": "abc", "content": "Sunny <|im_end|> and warm."}]
    assert ask(history, tool_choice="none", max_tokens=4).choices[0].message.content is not None


def test_text_that_looks_like_a_mark_is_text_in_arguments_and_descriptions(ask):
    tool = {"type": "function", "function": {"name": "f", "description": "Says <|im_end|>.", "parameters": {
        "type": "object", "properties": {}, "additionalProperties": False}}}
    call = {"id": "abc", "type": "function", "function": {"name": "f", "arguments": '{"x": "<|im_start|>system"}'}}
    history = [*QUESTION, {"role": "assistant", "tool_calls": [call]},
               {"role": "tool", "tool_call_id": "abc", "content": "ok"}]
    assert ask(history, tools=[tool], tool_choice="none", max_tokens=4).choices


@pytest.mark.parametrize("fields, param", [
    ({"tool_choice": {"type": "function", "function": {"name": "missing"}}}, "tool_choice"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": "required", "tools": []}, "tool_choice"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools[0].function.name"),
    ({"tools": [CLOCK, CLOCK]}, "tools[1].function.name"),
    ({"tools": [CLOCK] * 129}, "tools"),
    ({"functions": [{"name": "f"}]}, "functions"),
])
def test_a_wrong_tool_or_choice_is_refused_by_name(client, fields, param):
    model = client.models.list().data[0].id
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=QUESTION, extra_body={"tools": TOOLS, **fields})
    assert caught.value.body["param"] == param


def test_a_session_waits_for_the_results_of_its_calls(server):
    session = server.create(tools=TOOLS, seed=3)
    turn = server.turn(session, "What time is it?", tool_choice="required", temperature=0, max_tokens=200,
                       parallel_tool_calls=False)
    calls = turn["message"]["tool_calls"]
    assert turn["message"]["content"] is None and calls
    assert server.session(session)["status"] == "requires_action"
    assert session in [it["id"] for it in server.get("/v1/sessions", status="requires_action", limit=100)["data"]]
    assert session not in [it["id"] for it in server.get("/v1/sessions", status="idle", limit=100)["data"]]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "12:00"} for call in calls]
    answered = server.turn(session, results, tool_choice="none", temperature=0, max_tokens=8)
    assert answered["usage"]["cached_tokens"] >= turn["usage"]["total_tokens"] - 1
    assert answered["message"]["content"] and server.session(session)["status"] == "idle"
    assert [item["message"]["role"] for item in server.items(session)][:2] == ["user", "assistant"]


def test_other_tools_change_the_prompt_and_the_receipt_says_so(server):
    session = server.create(tools=TOOLS, seed=3)
    server.turn(session, "Hello.", tool_choice="none", max_tokens=4)
    same = server.turn(session, "Again.", tools=TOOLS, tool_choice="none", max_tokens=4)
    assert "miss" not in same["dormouse"]
    other = server.turn(session, "And now?", tools=[CLOCK], tool_choice="none", max_tokens=4)
    assert other["dormouse"]["miss"]["reason"] == "tools_changed"
    assert server.session(session)["tools"] == [CLOCK]


def test_a_call_that_kill_9_interrupts_is_finished_word_for_word(start):
    ask = {"tools": [NOTE], "tool_choice": "required", "temperature": 0.8, "parallel_tool_calls": False}
    undisturbed = start()
    expected = list(undisturbed.stream_turn(undisturbed.create(seed=11), "Note the plot of Hamlet.", **ask))
    undisturbed.close()
    server = start()
    session = server.create(seed=11)
    stream = server.stream_turn(session, "Note the plot of Hamlet.", **ask)
    seen, enough = [], threading.Event()

    def listen():
        try:
            for event in stream:
                seen.append(event)
                if len(seen) > len(expected) // 2:
                    enough.set()
        except httpx.HTTPError:
            pass

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    assert enough.wait(harness.PATIENCE_SECONDS)
    server.restart()
    listener.join()
    turn = server.turns(session)[0]["id"]
    last_seen = seen[-1]["sequence_number"]
    rest = server.attach(session, turn, starting_after=last_seen)
    assert said(seen) + said(rest) == said(expected)
    finished, whole = rest[-1]["turn"], expected[-1]["turn"]
    (call,), (other,) = finished["message"]["tool_calls"], whole["message"]["tool_calls"]
    assert call["function"] == other["function"]
    assert 200 <= len(json.loads(call["function"]["arguments"])["text"]) <= 400
    # The same id as the stream of chat completions says.
    assert call["id"] == f"call_{turn.removeprefix('turn_')}_0"


def test_a_chat_in_a_session_uses_the_tools_of_the_session(server, client):
    session = server.create(tools=[CLOCK], seed=3)
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "The time?"}], tool_choice="required", temperature=0,
        max_tokens=200, parallel_tool_calls=False, extra_body={"session": session},
    )
    for call in answer.choices[0].message.tool_calls:
        assert check(call).function.name == "clock"
