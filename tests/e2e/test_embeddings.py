"""`/v1/embeddings`: the unmodified `openai` client, vectors as sentence-transformers computes them, and wrong requests."""

import base64
import json
import os
import pathlib
import shutil
import struct
import threading

import httpx
import openai
import pytest

import harness

MODEL = pathlib.Path(
    os.environ.get("DORMOUSE_TEST_EMBEDDING_MODEL", harness.REPOSITORY / "models/weights/all-MiniLM-L6-v2")
)
NAME = MODEL.name
EXPECTED = json.loads((harness.REPOSITORY / "crates/embed/tests/expected.json").read_text())
PATH = "/v1/embeddings"


def unpack(text):
    """The numbers of a vector as it goes over the wire."""
    data = base64.b64decode(text, validate=True)
    return list(struct.unpack(f"<{len(data) // 4}f", data))


VECTORS = dict(zip(EXPECTED["texts"], map(unpack, EXPECTED["vectors"])))
TOKENS = dict(zip(EXPECTED["texts"], EXPECTED["tokens"]))
FIRST, SECOND, THIRD = EXPECTED["texts"][:3]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    assert (MODEL / "model.safetensors").exists(), f"there is no {MODEL}: run scripts/fetch_weights"
    data_dir = tmp_path_factory.mktemp("embeddings") / "data"
    with harness.Server(data_dir, flags=["--embedding-model", str(MODEL)]) as server:
        yield server.start()


@pytest.fixture
def embed(client):
    def embed(input, **fields):
        return client.embeddings.create(**{"input": input, "model": NAME, **fields})

    return embed


def assert_close(found, expected, tolerance=1e-4):
    assert len(found) == len(expected)
    assert max(abs(left - right) for left, right in zip(found, expected)) < tolerance


def assert_refused(embed, input, param, *words, **fields):
    with pytest.raises(openai.BadRequestError) as caught:
        embed(input, **fields)
    assert caught.value.body["type"] == "invalid_request_error"
    assert caught.value.param == param
    assert caught.value.body["message"].startswith(param)
    for word in words:
        assert word in caught.value.body["message"]
    return caught.value


def test_a_text_has_the_vector_of_sentence_transformers(embed):
    answer = embed(FIRST)
    assert (answer.object, answer.model) == ("list", NAME)
    (item,) = answer.data
    assert (item.object, item.index) == ("embedding", 0)
    assert_close(item.embedding, VECTORS[FIRST])
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == TOKENS[FIRST]


def test_a_list_is_answered_in_its_order(embed):
    # By length in no order, so that computing in another one would be noticed.
    texts = EXPECTED["texts"] + EXPECTED["texts"][::-1]
    answer = embed(texts)
    assert [item.index for item in answer.data] == list(range(len(texts)))
    for text, item in zip(texts, answer.data):
        assert_close(item.embedding, VECTORS[text])
    assert answer.usage.prompt_tokens == 2 * sum(EXPECTED["tokens"])


def test_floats_and_base64_are_the_same_numbers(server):
    answers = {
        encoding: server.post(PATH, {"input": SECOND, "model": NAME, "encoding_format": encoding})
        for encoding in ("float", "base64")
    }
    floats, text = (answers[encoding]["data"][0]["embedding"] for encoding in ("float", "base64"))
    assert isinstance(text, str) and len(unpack(text)) == 384
    assert [struct.pack("<f", value) for value in floats] == [struct.pack("<f", value) for value in unpack(text)]
    # As OpenAI does where nothing is said.
    assert server.post(PATH, {"input": SECOND})["data"][0]["embedding"] == floats
    assert server.post(PATH, {"input": SECOND})["model"] == NAME


def test_the_client_may_ask_for_floats(embed):
    assert_close(embed(FIRST, encoding_format="float").data[0].embedding, VECTORS[FIRST])


def test_tokens_are_taken_as_they_are(embed):
    # [CLS] hello world ! [SEP]
    tokens = [101, 7592, 2088, 999, 102]
    text = embed("Hello world!")
    assert_close(embed(tokens).data[0].embedding, text.data[0].embedding, 1e-6)
    assert embed(tokens).usage.prompt_tokens == text.usage.prompt_tokens == 5
    answer = embed([tokens, tokens[:1]])
    assert_close(answer.data[0].embedding, text.data[0].embedding, 1e-6)
    assert len(answer.data) == 2 and answer.usage.prompt_tokens == 6


def test_fewer_dimensions_are_the_first_ones_at_length_one(embed):
    short = embed([FIRST, SECOND], dimensions=64).data
    for text, item in zip((FIRST, SECOND), short):
        beginning = VECTORS[text][:64]
        length = sum(value * value for value in beginning) ** 0.5
        assert_close(item.embedding, [value / length for value in beginning])
    assert_close(embed(FIRST, dimensions=384).data[0].embedding, VECTORS[FIRST])


def test_related_sentences_are_closer_than_unrelated_ones(embed):
    first, second, third = (item.embedding for item in embed([FIRST, SECOND, THIRD]).data)
    likeness = lambda left, right: sum(left * right for left, right in zip(left, right))
    assert likeness(first, second) > 0.5 > likeness(first, third)


def test_an_input_that_is_too_long_is_refused_with_both_numbers(embed):
    error = assert_refused(embed, "mouse " * 300, "input", "302", "256")
    assert error.code == "context_length_exceeded"
    assert_refused(embed, ["fine", "mouse " * 300], "input[1]", "302", "256")
    assert_refused(embed, [[101] * 257], "input[0]", "257", "256")
    assert embed("mouse " * 254).usage.prompt_tokens == 256


@pytest.mark.parametrize(
    "input, param",
    [
        ("", "input"),
        ([], "input"),
        (["fine", ""], "input[1]"),
        ([[]], "input[0]"),
        ([[101], []], "input[1]"),
        (5, "input"),
        ({"text": "x"}, "input"),
        (["fine", 5], "input[1]"),
        (["fine", None], "input[1]"),
        ([101, "x"], "input[1]"),
        ([101, -1], "input[1]"),
        ([101, 30522], "input[1]"),
        ([[101], [101, 99999]], "input[1][1]"),
        ([[101], "x"], "input[1]"),
        (["x"] * 2049, "input"),
    ],
    ids=str,
)
def test_an_input_that_cannot_be_embedded_is_named(input, param, embed):
    # The client's own types do not stop it from sending such things.
    assert_refused(embed, "x", param, extra_body={"input": input})


@pytest.mark.parametrize(
    "field, value",
    [("dimensions", 0), ("dimensions", 385), ("dimensions", "64"), ("encoding_format", "hex"), ("encoding_format", 5),
     ("model", 5)],
)
def test_a_field_of_a_wrong_type_or_range_is_named(field, value, embed):
    assert_refused(embed, "x", field, extra_body={field: value})


def test_an_input_is_required(server):
    response = server.http.post(PATH, json={"model": NAME})
    assert response.status_code == 400 and response.json()["error"]["param"] == "input"


def test_another_model_is_not_found(client):
    for model in ("text-embedding-3-small", harness.MODEL.stem):
        with pytest.raises(openai.NotFoundError) as caught:
            client.embeddings.create(input="x", model=model)
        assert caught.value.param == "model" and NAME in caught.value.message


def test_the_model_is_listed_after_those_that_talk(client):
    listed = client.models.list().data
    assert [model.id for model in listed[:2]] == [harness.MODEL.stem, NAME]
    assert [model.model_extra["dormouse"]["kind"] for model in listed[:2]] == ["chat", "embedding"]
    details = client.models.retrieve(NAME).model_extra["dormouse"]
    assert (details["state"], details["dimensions"], details["context"]) == ("loaded", 384, 256)
    assert len({model.id for model in listed}) == len(listed)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Hi"}])


def test_without_an_embedding_model_the_answer_says_how_to_serve_one(start):
    client = start().openai()
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(input="x", model="text-embedding-3-small")
    assert "--embedding-model" in caught.value.message
    (known,) = [model for model in client.models.list() if model.id == "all-MiniLM-L6-v2"]
    assert known.model_extra["dormouse"]["state"] == "known"


def test_chat_goes_on_while_embeddings_are_computed(server, client):
    stop, batches = threading.Event(), []

    def embed_on():
        while not stop.is_set():
            batches.append(len(client.embeddings.create(input=[[101] * 256] * 16, model=NAME).data))

    thread = threading.Thread(target=embed_on)
    thread.start()
    try:
        for _ in range(3):
            answer = client.chat.completions.create(
                model=harness.MODEL.stem, messages=[{"role": "user", "content": "Hi"}], max_tokens=8
            )
            assert answer.usage.completion_tokens >= 1
        harness.wait_until(lambda: batches, "embeddings beside the chat")
    finally:
        stop.set()
        thread.join()
    assert set(batches) == {16}


def test_clients_that_leave_take_their_requests_with_them(server, embed):
    # Minutes of work, if it were done: 20 requests of 250,000 tokens.
    body = {"input": [[101] * 250] * 1000, "model": NAME}
    for _ in range(20):
        with pytest.raises(httpx.ReadTimeout):
            server.http.post(PATH, json=body, timeout=httpx.Timeout(harness.PATIENCE_SECONDS, read=0.05))
    assert_close(embed(FIRST).data[0].embedding, VECTORS[FIRST])


def test_more_requests_than_can_wait_are_told_to_come_again(server):
    body = {"input": [[101] * 250] * 1000, "model": NAME}
    refused, enough = [], threading.Event()

    def ask():
        # Leaves when another one was refused: nobody waits for the vectors.
        with httpx.Client(base_url=server.url, timeout=1) as client:
            while not enough.is_set():
                try:
                    response = client.post(PATH, json=body)
                except httpx.TimeoutException:
                    continue
                if response.status_code == 429:
                    refused.append(response)
                    enough.set()

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused[0].json()["error"]["type"] == "rate_limit_error" and refused[0].headers["retry-after"] == "1"


def test_a_folder_that_cannot_be_served_is_explained_at_the_start(tmp_path):
    def refusal(model):
        server = harness.Server(tmp_path / "data", flags=["--embedding-model", str(model)])
        with pytest.raises(harness.StartFailed) as caught:
            server.start()
        server.close()
        return caught.value.stderr

    gguf = tmp_path / "encoder.gguf"
    gguf.write_bytes(b"GGUF")
    assert "a folder as sentence-transformers saves it" in refusal(gguf)
    assert "serve it with --model" in refusal("smollm2")
    assert "no model 'nothing'" in refusal("nothing")
    assert "dormouse models pull all-MiniLM-L6-v2" in refusal("all-minilm-l6-v2")
    broken = tmp_path / "broken"
    shutil.copytree(MODEL, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "xlm-roberta"}))
    said = refusal(broken)
    assert "xlm-roberta" in said and "supported: bert" in said
    (broken / "config.json").write_text(json.dumps({**config, "hidden_size": 768}))
    assert "do not fit config.json" in refusal(broken)
    (broken / "config.json").write_text(json.dumps(config))
    with open(broken / "model.safetensors", "r+b") as file:
        file.truncate(50_000_000)
    assert "model.safetensors" in refusal(broken)
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"x")
    assert "safe_serialization=True" in refusal(broken)
