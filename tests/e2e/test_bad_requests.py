"""Requests that no well-behaved client sends, and clients that misbehave."""

import json
import socket
import threading
import time

import pytest

import harness

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello!"}]


def error(response, status):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    return error


def raw(server, head, body=b"", read=True):
    """Sends bytes as they are and answers what comes back."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=harness.PATIENCE_SECONDS) as connection:
        connection.sendall(head + body)
        answer = b""
        while read and (part := connection.recv(65536)):
            answer += part
        return answer


def test_malformed_json_is_answered_with_its_place(server):
    message = error(server.http.post(CHAT, content=b'{"messages": [oops'), 400)["message"]
    assert "JSON" in message and "column" in message
    for body in (b"[]", b'"text"', b"5", b"null", b"{}", b"", b"\x00", b'{"a":1}{"b":2}', b"[" * 100_000):
        error(server.http.post(CHAT, content=body), 400)


def test_text_that_is_not_utf8_is_answered_with_its_place(server):
    body = b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}'
    assert "UTF-8" in error(server.http.post(CHAT, content=body), 400)["message"]
    # A lone surrogate is JSON that no string can hold.
    error(server.http.post(CHAT, content=b'{"messages": [{"role": "user", "content": "\\ud800"}]}'), 400)


WRONG = {
    "model": [5, [], {}],
    "messages": ["hello", {}, 5, None, [], ["hello"], [{}], [{"role": "user"}], [{"role": 5, "content": "x"}],
                 [{"role": "wizard", "content": "x"}], [{"role": "user", "content": 5}],
                 [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]],
    "temperature": ["hot", -1, 3, [], True],
    "top_p": ["x", -0.5, 1.5],
    "top_k": ["x", 1.5],
    "min_p": [2, "x"],
    "max_tokens": ["x", 0, -5, 1.5, []],
    "max_completion_tokens": ["x", 0],
    "n": [0, 1000, "two", 1.5],
    "seed": ["x", 1.5, []],
    "stop": [5, [5], {}, [""], ["x"] * 100],
    "stream": ["yes", 5],
    "logprobs": [5, "yes"],
    "top_logprobs": [50, -1, "x"],
    "presence_penalty": ["x", 5, -5],
    "frequency_penalty": ["x", 5, -5],
    "repetition_penalty": ["x", 0, -1],
    "logit_bias": ["x", [], {"hello": 1}, {"5": "x"}, {"5": 1000}, {"-1": 5}],
    "session": [5, [], "a/b", "../up"],
    "store": ["x"],
    "stream_options": ["x", {"include_usage": "x"}],
}


@pytest.mark.parametrize("field", WRONG)
def test_a_field_of_a_wrong_type_or_range_is_named(field, server):
    for value in WRONG[field]:
        body = {"messages": MESSAGES, "max_tokens": 1, field: value}
        answer = error(server.http.post(CHAT, json=body), 400)
        assert answer["param"].startswith(field), (value, answer)
        assert field in answer["message"], (value, answer)
        assert answer["type"] == "invalid_request_error"


@pytest.mark.parametrize("field, value", [
    ("functions", [{"name": "f"}]),
    ("modalities", ["audio"]),
    ("audio", {"voice": "x"}),
])
def test_a_meaning_that_is_not_supported_is_named(field, value, server):
    answer = error(server.http.post(CHAT, json={"messages": MESSAGES, field: value}), 400)
    assert answer["param"] == field and field in answer["message"]


def test_a_token_bias_beyond_the_vocabulary_is_refused(server):
    body = {"messages": MESSAGES, "max_tokens": 1, "logit_bias": {"99999999": 5}}
    assert error(server.http.post(CHAT, json=body), 400)["param"] == "logit_bias"


def test_unknown_models_sessions_turns_and_routes_are_not_found(server):
    assert error(server.http.post(CHAT, json={"model": "x", "messages": MESSAGES}), 404)["code"] == "model_not_found"
    session = server.create()
    for method, path in [
        ("GET", "/v1/sessions/sess_0"), ("DELETE", "/v1/sessions/sess_0"), ("PATCH", "/v1/sessions/sess_0"),
        ("GET", "/v1/sessions/sess_0/items"), ("GET", "/v1/sessions/sess_0/events"), ("GET", "/v1/sessions/sess_0/turns"),
        ("POST", "/v1/sessions/sess_0/fork"), ("POST", "/v1/sessions/sess_0/park"), ("POST", "/v1/sessions/sess_0/resume"),
        ("GET", f"/v1/sessions/{session}/turns/turn_0"), ("POST", f"/v1/sessions/{session}/turns/turn_0/cancel"),
        ("GET", f"/v1/sessions/{session}/turns/turn_0?stream=true"), ("GET", "/v1/nothing"), ("GET", "/"),
        ("GET", "/v1/sessions/..%2f..%2fetc%2fpasswd"), ("GET", "/v1/models/no-model"),
    ]:
        error(server.http.request(method, path, json={} if method in ("POST", "PATCH") else None), 404)
    error(server.http.post("/v1/sessions/sess_0/turns", json={"input": "x"}), 404)
    error(server.http.post("/v1/sessions/sess_0/rewind", json={"to": 0}), 404)


def test_a_wrong_method_is_not_allowed(server):
    for method, path in [("GET", CHAT), ("PUT", "/v1/sessions"), ("POST", "/health"), ("DELETE", "/v1/models")]:
        error(server.http.request(method, path), 405)


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=-1", "limit=100000", "status=busy", "after=sess_0"])
def test_a_wrong_query_of_the_list_is_refused(query, server):
    assert server.http.get(f"/v1/sessions?{query}").status_code in (400, 404)
    if query.split("=")[0] != "after":
        assert error(server.http.get(f"/v1/sessions?{query}"), 400)["param"] == query.split("=")[0]


def test_a_turn_and_a_session_of_wrong_types_are_refused_by_name(server):
    session = server.create()
    for field, value in [("input", 5), ("input", ""), ("input", []), ("input", [{"role": "x", "content": "y"}]),
                         ("stream", "x"), ("background", "x"), ("temperature", "x")]:
        answer = error(server.http.post(f"/v1/sessions/{session}/turns", json={"input": "x", field: value}), 400)
        assert answer["param"].startswith(field)
    for field, value in [("name", 5), ("name", ""), ("name", "a/b"), ("metadata", {"a": 5}), ("seed", "x"),
                         ("ttl_seconds", -1), ("pinned", "x"), ("instructions", 5), ("kv_dtype", "f64"),
                         ("tools", [{"type": "function"}])]:
        assert error(server.http.post("/v1/sessions", json={field: value}), 400)["param"].startswith(field)
    for body in ({}, {"to": -1}, {"to": "x"}, {"to": 5.5}):
        assert error(server.http.post(f"/v1/sessions/{session}/rewind", json=body), 400)["param"] == "to"
    assert server.items(session) == []


def test_a_context_overflow_says_both_numbers(server):
    answer = error(server.http.post(CHAT, json={"messages": [{"role": "user", "content": "word " * 9000}]}), 400)
    assert answer["code"] == "context_length_exceeded"
    assert "8192" in answer["message"] and "9031" in answer["message"]


def test_a_body_of_fifty_megabytes_is_refused_and_the_server_goes_on(server):
    content = b'{"messages": [{"role": "user", "content": "' + b"x" * (50 << 20) + b'"}]}'
    assert "10485760" in error(server.http.post(CHAT, content=content), 413)["message"]
    # Also when its size is not declared.
    chunks = (content[start : start + (1 << 20)] for start in range(0, len(content), 1 << 20))
    error(server.http.post(CHAT, content=chunks), 413)
    assert server.http.get("/health").status_code == 200


def test_other_hosts_and_foreign_web_pages_are_refused(server):
    assert error(server.http.get("/v1/models", headers={"Host": "evil.example"}), 403)["code"] == "host_not_allowed"
    for origin in ("https://evil.example", "null"):
        answer = server.http.post(CHAT, json={"messages": MESSAGES}, headers={"Origin": origin})
        assert error(answer, 403)["code"] == "origin_not_allowed"


def test_bytes_that_are_no_http_do_not_hurt(server):
    for head in (b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST " + CHAT.encode() +
                 b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", b"A" * 100_000):
        try:
            assert b" 200 " not in raw(server, head + b"\r\n\r\n")[:20]
        except ConnectionError:
            pass  # Hanging up is an answer too.
    # A body that breaks off.
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n".encode()
    raw(server, head, b'{"messages": ', read=False)
    assert server.http.get("/health").status_code == 200


def test_a_slow_client_does_not_hold_others_up(server):
    body = b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}'
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    host, port = server.url.removeprefix("http://").split(":")
    answers, others_are_served = [], threading.Event()

    def dawdle():
        with socket.create_connection((host, int(port)), timeout=harness.PATIENCE_SECONDS) as connection:
            for byte in (head + body)[:-1]:
                connection.sendall(bytes([byte]))
                time.sleep(0.001)
            others_are_served.wait()
            connection.sendall(body[-1:])
            answer = b""
            while part := connection.recv(65536):
                answer += part
            answers.append(answer)

    slow = [threading.Thread(target=dawdle) for _ in range(20)]
    for thread in slow:
        thread.start()
    for _ in range(3):
        response = server.http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 1, "temperature": 0})
        assert response.status_code == 200
    assert answers == []
    others_are_served.set()
    for thread in slow:
        thread.join()
    assert len(answers) == 20 and all(answer.startswith(b"HTTP/1.1 200") for answer in answers)


def running(server):
    return server.metric("dormouse_turns_running") + server.metric("dormouse_turns_waiting")


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "waiting"])
def test_a_client_that_vanishes_takes_its_stateless_turn_with_it(stream, server):
    harness.wait_until(lambda: running(server) == 0, "an idle engine")
    said_before = server.metric("dormouse_output_tokens_total")
    body = json.dumps({"messages": MESSAGES, "max_tokens": 5000, "ignore_eos": True, "stream": stream}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=harness.PATIENCE_SECONDS) as connection:
        connection.sendall(head + body)
        harness.wait_until(lambda: running(server) == 1, "the turn to run")
    harness.wait_until(lambda: running(server) == 0, "the turn to be cancelled")
    assert server.metric("dormouse_output_tokens_total") < said_before + 5000


def test_a_session_turn_outlives_its_vanished_client(server):
    server.create(name="outlives")
    body = {"messages": MESSAGES, "max_tokens": 30, "ignore_eos": True, "session": "outlives", "stream": True}
    with server.http.stream("POST", CHAT, json=body) as response:
        next(response.iter_lines())
    turn = server.turns("outlives")[0]["id"]
    finished = server.finish("outlives", turn)
    assert (finished["status"], finished["usage"]["completion_tokens"]) == ("completed", 30)


def test_a_client_that_does_not_read_does_not_hold_others_up(server):
    body = b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200, "ignore_eos": true, "stream": true}'
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=harness.PATIENCE_SECONDS) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.sendall(head + body)
        response = server.http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 2})
        assert response.status_code == 200
    harness.wait_until(lambda: running(server) == 0, "the turn to be over")
