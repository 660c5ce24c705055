"""Answers in the form that was asked for: JSON, and JSON that satisfies a schema, also after kill -9."""

import json
import time
from enum import Enum

import openai
import pydantic
import pytest

from harness import Refused, text_of, tokens_of

QUESTION = [{"role": "user", "content": "Describe the weather in Lisbon."}]


class Wind(str, Enum):
    NORTH = "north"
    SOUTH = "south"


class Hour(pydantic.BaseModel):
    hour: int = pydantic.Field(ge=0, le=23)
    degrees: float = pydantic.Field(ge=-40, le=60)
    wind: Wind


class Report(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=30)
    hours: list[Hour] = pydantic.Field(min_length=1, max_length=3)
    note: str | None = pydantic.Field(max_length=40)


SCHEMA = {"type": "json_schema", "json_schema": {"name": "report", "strict": True, "schema": Report.model_json_schema()}}
# Sampled, so that the seed and the form together decide.
GENERATION = {"temperature": 1.1, "max_tokens": 900, "response_format": SCHEMA}


@pytest.fixture
def ask(client):
    def ask(messages=QUESTION, **fields):
        fields = {"model": client.models.list().data[0].id, "max_tokens": 900, "temperature": 0, **fields}
        return client.chat.completions.create(messages=messages, **fields)

    return ask


def test_the_clients_parse_gives_objects(client):
    model = client.models.list().data[0].id
    for seed in range(6):
        answer = client.chat.completions.parse(
            model=model, messages=QUESTION, response_format=Report, seed=seed, temperature=1.2, max_tokens=900
        )
        assert answer.choices[0].finish_reason == "stop"
        report = answer.choices[0].message.parsed
        assert isinstance(report, Report) and 1 <= len(report.hours) <= 3


def test_a_streamed_answer_is_the_whole_one(client, ask):
    whole = ask(response_format=SCHEMA)
    assert Report.model_validate_json(whole.choices[0].message.content)
    chunks = list(ask(response_format=SCHEMA, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    model = client.models.list().data[0].id
    with client.chat.completions.stream(
        model=model, messages=QUESTION, response_format=Report, temperature=0, max_tokens=900
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == Report.model_validate_json(whole.choices[0].message.content)


def test_every_choice_has_the_form(ask):
    answer = ask(response_format=SCHEMA, n=3, temperature=1.5, seed=4)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) > 1
    for text in texts:
        Report.model_validate_json(text)


def test_a_json_object_is_an_object_or_cut_off(ask):
    for seed in range(5):
        choice = ask(response_format={"type": "json_object"}, temperature=1.3, seed=seed, max_tokens=300).choices[0]
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.finish_reason == "length"


def test_the_end_is_not_ignored_where_nothing_can_follow(ask):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form = {"type": "json_schema", "json_schema": {"name": "ok", "schema": schema}}
    answer = ask(response_format=form, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content)["ok"], bool)


@pytest.mark.parametrize(
    ("keyword", "schema"),
    [
        ("not", {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}),
        ("uniqueItems", {"type": "array", "items": {"type": "string"}, "uniqueItems": True}),
        ("if", {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}}),
        ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "number"}]}),
        ("pattern", {"type": "string", "pattern": "(?<!a)b"}),
        ("$ref", {"$ref": "https://example.com/schema.json"}),
        ("type", {"type": "strnig"}),
    ],
)
def test_a_schema_that_cannot_be_honoured_is_refused_and_the_keyword_named(ask, server, keyword, schema):
    before = len(server.get("/v1/sessions", limit=100)["data"])
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(response_format=form)
    with pytest.raises(openai.BadRequestError):
        ask(response_format=form, extra_body={"session": "a-name-of-its-own"})
    assert caught.value.param == "response_format.json_schema.schema"
    assert f'"{keyword}"' in caught.value.message
    assert len(server.get("/v1/sessions", limit=100)["data"]) == before


def test_a_refused_turn_leaves_its_session_as_it_was(server):
    session = server.create()
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"not": {}}}}
    with pytest.raises(Refused) as refused:
        server.turn(session, "Hello", response_format=form)
    assert refused.value.status == 400 and refused.value.error["param"] == "response_format.json_schema.schema"
    assert server.turns(session) == [] and server.session(session)["status"] == "idle"
    assert server.turn(session, "Hello", max_tokens=3)["output_text"]


def test_an_answer_killed_anywhere_goes_on_in_its_form_word_for_word(start, dice):
    server = start()
    reference = server.create(seed=77)
    began = time.monotonic()
    events = list(server.stream_turn(reference, "Describe the weather in Lisbon.", **GENERATION))
    seconds = time.monotonic() - began
    whole = text_of(events)
    assert events[-1]["turn"]["finish_reason"] == "stop"
    Report.model_validate_json(whole)
    for _ in range(4):
        session = server.create(seed=77)
        stream = server.stream_turn(session, "Describe the weather in Lisbon.", **GENERATION)
        wanted = dice.randrange(3, len(events) - 3)
        seen = [next(stream) for _ in range(wanted)]
        time.sleep(dice.uniform(0, seconds / 20))
        server.kill()
        server.start()
        turn = server.turns(session)[0]["id"]
        rest = server.attach(session, turn, seen[-1]["sequence_number"])
        assert text_of(seen + rest) == whole
        assert tokens_of(seen + rest) == tokens_of(events)
        assert rest[-1]["turn"]["output_text"] == whole
