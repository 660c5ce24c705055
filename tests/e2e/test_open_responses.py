"""The cases of the Open Responses compliance test, and their objects and events held against strict types."""

import json

import pytest
from openai.types import responses as types
from openresponses_types import types as open_types
from pydantic import TypeAdapter

EVENTS = {
    "response.created": (types.ResponseCreatedEvent, open_types.ResponseCreatedStreamingEvent),
    "response.queued": (types.ResponseQueuedEvent, open_types.ResponseQueuedStreamingEvent),
    "response.in_progress": (types.ResponseInProgressEvent, open_types.ResponseInProgressStreamingEvent),
    "response.completed": (types.ResponseCompletedEvent, open_types.ResponseCompletedStreamingEvent),
    "response.incomplete": (types.ResponseIncompleteEvent, open_types.ResponseIncompleteStreamingEvent),
    "response.output_item.added": (types.ResponseOutputItemAddedEvent, open_types.ResponseOutputItemAddedStreamingEvent),
    "response.output_item.done": (types.ResponseOutputItemDoneEvent, open_types.ResponseOutputItemDoneStreamingEvent),
    "response.content_part.added": (
        types.ResponseContentPartAddedEvent, open_types.ResponseContentPartAddedStreamingEvent),
    "response.content_part.done": (
        types.ResponseContentPartDoneEvent, open_types.ResponseContentPartDoneStreamingEvent),
    "response.output_text.delta": (types.ResponseTextDeltaEvent, open_types.ResponseOutputTextDeltaStreamingEvent),
    "response.output_text.done": (types.ResponseTextDoneEvent, open_types.ResponseOutputTextDoneStreamingEvent),
    "response.function_call_arguments.delta": (
        types.ResponseFunctionCallArgumentsDeltaEvent, open_types.ResponseFunctionCallArgumentsDeltaStreamingEvent),
    "response.function_call_arguments.done": (
        types.ResponseFunctionCallArgumentsDoneEvent, open_types.ResponseFunctionCallArgumentsDoneStreamingEvent),
}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "parameters": {"type": "object", "properties": {"location": {"type": "string", "maxLength": 30}},
                   "required": ["location"], "additionalProperties": False},
}


@pytest.fixture
def model(server):
    return server.get("/v1/models")["data"][0]["id"]


@pytest.fixture
def create(server, model):
    def create(**fields):
        fields = {"model": model, "temperature": 0, "max_output_tokens": 200, **fields}
        answer = server.http.post("/v1/responses", json=fields)
        assert answer.status_code == 200, answer.text
        return checked(answer.json())

    return create


@pytest.fixture
def stream(server, model):
    def stream(**fields):
        """The events, each held against its types and its frame."""
        fields = {"model": model, "temperature": 0, "max_output_tokens": 200, "stream": True, **fields}
        with server.http.stream("POST", "/v1/responses", json=fields) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            frames = answer.read().decode().split("\n\n")
        frames = [frame for frame in frames if frame and not frame.startswith(":")]
        assert frames.pop() == "data: [DONE]"
        events = []
        for frame in frames:
            name, data = frame.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}"
            for kind in EVENTS[event["type"]]:
                TypeAdapter(kind).validate_python(event, strict=False)
            events.append(event)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        checked(events[-1]["response"])
        return events

    return stream


def checked(response):
    """The object, valid under the types of OpenAI's client and of the Open Responses specification."""
    TypeAdapter(types.Response).validate_python(response)
    open_types.ResponseResource.model_validate(response)
    return response


def text_of(response):
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


def test_basic_response(create):
    response = create(input=[{"type": "message", "role": "user", "content": "Say hello in exactly 3 words."}])
    assert response["status"] == "completed" and text_of(response)
    assert all(item["status"] == "completed" for item in response["output"])


def test_streaming_response(create, stream):
    question = [{"type": "message", "role": "user", "content": "Count from 1 to 5."}]
    events = stream(input=question)
    final = events[-1]["response"]
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == text_of(final) == text_of(create(input=question))


def test_system_prompt(create):
    system = {"type": "message", "role": "system", "content": "You are a pirate. Always respond in pirate speak."}
    question = {"type": "message", "role": "user", "content": "Say hello."}
    with_system = create(input=[system, question])
    assert text_of(with_system) != text_of(create(input=[question]))
    # The same words as instructions make the same prompt.
    instructed = create(input=[question], instructions=system["content"])
    assert text_of(instructed) == text_of(with_system)
    assert instructed["usage"]["input_tokens"] == with_system["usage"]["input_tokens"]


def test_tool_calling(create):
    response = create(input="What's the weather like in San Francisco?", tools=[WEATHER], tool_choice="required")
    call = next(item for item in response["output"] if item["type"] == "function_call")
    assert call["name"] == "get_weather" and call["call_id"]
    assert set(json.loads(call["arguments"])) == {"location"}


def test_tool_calling_with_streaming(create, stream):
    fields = {"input": "What's the weather like in San Francisco?", "tools": [WEATHER], "tool_choice": "required"}
    events = stream(**fields)
    kinds = [event["type"] for event in events]
    assert kinds.index("response.output_item.added") < kinds.index("response.function_call_arguments.delta")
    assert kinds.index("response.function_call_arguments.done") < kinds.index("response.output_item.done")
    done = next(event for event in events if event["type"] == "response.function_call_arguments.done")
    fragments = [event["delta"] for event in events
                 if event["type"] == "response.function_call_arguments.delta" and event["item_id"] == done["item_id"]]
    assert "".join(fragments) == done["arguments"]
    whole = create(**fields)
    assert [item.get("arguments") for item in whole["output"]] == [
        item.get("arguments") for item in events[-1]["response"]["output"]]


def test_multi_turn_conversation(create):
    history = [
        {"type": "message", "role": "user", "content": "My name is Alice."},
        {"type": "message", "role": "assistant", "content": "Hello Alice! Nice to meet you. How can I help you today?"},
        {"type": "message", "role": "user", "content": "What is my name?"},
    ]
    response = create(input=history)
    # What a model this small says of it is its own affair, but it has read all of it.
    assert response["status"] == "completed" and text_of(response)
    assert response["usage"]["input_tokens"] > create(input=history[2:])["usage"]["input_tokens"] + 20


def test_a_tools_output_goes_back(create):
    called = create(input="What's the weather like in Paris?", tools=[WEATHER], tool_choice="required")
    calls = [item for item in called["output"] if item["type"] == "function_call"]
    outputs = [{"type": "function_call_output", "call_id": call["call_id"], "output": "rain"} for call in calls]
    answer = create(input=outputs, previous_response_id=called["id"], tools=[WEATHER], tool_choice="none")
    assert text_of(answer) and answer["usage"]["input_tokens_details"]["cached_tokens"] > 0


def test_a_wrong_request_is_an_error_object(server):
    answer = server.http.post("/v1/responses", json={"input": 5})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == "input"
