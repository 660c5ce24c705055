"""/openapi.json: it is valid, its examples work, and whatever is asked by it is answered as it says.

`DORMOUSE_TEST_FUZZ` is the number of random requests to each operation; a failure prints a request that plays it again.
"""

import os

import hypothesis
import openapi_spec_validator
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import harness

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = int(os.environ.get("DORMOUSE_TEST_FUZZ", "20"))
SEED = int(os.environ.get("DORMOUSE_TEST_SEED") or "1")
# Answers are bounded by the context: what a random request does not bound is not long.
CONTEXT = "128"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with harness.Server(tmp_path_factory.mktemp("openapi") / "data", flags=["--ctx", CONTEXT]) as server:
        yield server.start()


@pytest.fixture(scope="module")
def known(small):
    """Things that are there, for the operations on one of them."""
    session = small.create(name="a session")
    turn = small.turn(session, "Hello", max_tokens=2)["id"]
    conversation = small.post("/v1/conversations", {"items": [{"role": "user", "content": "Hi"}]})["id"]
    item = small.get(f"/v1/conversations/{conversation}/items")["data"][0]["id"]
    response = small.post("/v1/responses", {"input": "Hello", "max_output_tokens": 2})["id"]
    small.post("/v1/keys", {"name": "a key"})
    return {"session": session, "turn": turn, "conversation": conversation, "item": item, "response": response,
            "key": "a key", "model": harness.MODEL.stem}


@pytest.fixture(scope="module")
def document(small):
    return small.get("/openapi.json")


def test_the_document_is_valid(document):
    assert document["openapi"].startswith("3.1")
    openapi_spec_validator.validate(document)


def test_its_examples_are_answered_as_it_says(document, small, known):
    api = schemathesis.openapi.from_dict(document)
    tried = 0
    for result in api.get_all_operations():
        operation = result.ok()
        body = operation.definition.raw.get("requestBody")
        if not body:
            continue
        example = body["content"]["application/json"]["example"]
        if operation.path.startswith("/v1/embeddings"):
            continue
        path = {name: known[name] for name in known if "{" + name + "}" in operation.path}
        case = operation.Case(path_parameters=path, body=example, media_type="application/json")
        response = case.call(base_url=small.url)
        assert response.status_code < 300, f"{operation.label}: {response.status_code} {response.text}"
        case.validate_response(response, checks=CHECKS)
        tried += 1
    assert tried > 10


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
def test_whatever_is_asked_is_answered_as_it_says(document, small, known, mode):
    """Requests as the document allows them, and as it does not."""
    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = result.ok()

        @hypothesis.seed(SEED)
        @hypothesis.settings(max_examples=EXAMPLES, deadline=None, database=None,
                             suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def ask(case):
            bound(case, known)
            case.call_and_validate(base_url=small.url, checks=CHECKS, timeout=harness.PATIENCE_SECONDS)

        try:
            ask()
        except hypothesis.errors.Unsatisfiable:
            # There is no wrong way to ask for it.
            assert mode is GenerationMode.NEGATIVE and not operation.body, operation.label


def bound(case, known):
    """Half of what is asked for by name is there, deletions apart; and no answer is long or endless."""
    for name in list(case.path_parameters or {}):
        value = case.path_parameters[name]
        if case.method != "DELETE" and len(str(value)) % 2 == 0:
            case.path_parameters[name] = known[name]
    query = case.query or {}
    if case.operation.path.endswith("/events"):
        query.pop("stream", None)
    if isinstance(case.body, dict):
        for name in ("n", "best_of"):
            if isinstance(case.body.get(name), int) and case.body[name] > 2:
                case.body[name] = 2
