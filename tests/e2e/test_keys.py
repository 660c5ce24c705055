"""API keys: who may ask, for whom, and how much. And web pages, which may not unless they are listed."""

import json
import subprocess

import httpx
import openai
import pytest

import harness

MODEL = harness.MODEL.stem
MESSAGES = [{"role": "user", "content": "Name a colour. " + "The sea is blue and the grass is green. " * 12}]


def dormouse(server_or_folder, *arguments, key=None, fails=False):
    folder = getattr(server_or_folder, "data_dir", server_or_folder)
    command = [harness.BINARY, "--data-dir", folder, *arguments]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder)} | ({"DORMOUSE_API_KEY": key} if key else {})
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert (done.returncode != 0) == fails, done.stderr
    return done


def create(where, name, *flags, key=None):
    """A new key's secret."""
    return dormouse(where, "keys", "create", name, *flags, key=key).stdout.strip()


def ask(server, secret, **fields):
    return server.openai(api_key=secret).chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=2, temperature=0, **fields
    )


@pytest.fixture
def locked(start, tmp_path):
    """A server that asks for keys, and the secret of its administrator."""
    folder = tmp_path / "locked"
    admin = create(folder, "ops", "--scope", "admin")
    return start(folder, flags=["--require-key"]), admin


def test_a_server_that_needs_keys_does_not_start_without_one(tmp_path):
    for flags in [("--host", "0.0.0.0"), ("--require-key",)]:
        done = dormouse(tmp_path / "data", "serve", "--model", harness.MODEL, "--port", "0", *flags, fails=True)
        assert "dormouse keys create" in done.stderr and "ready" not in done.stdout


def test_keys_are_made_listed_and_revoked_with_and_without_a_server(locked):
    server, admin = locked
    secret = create(server, "ci", "--tenant", "team-a", "--requests-per-minute", "50", key=admin)
    assert secret.startswith("dm_") and len(secret) == 67
    listed = json.loads(dormouse(server, "--json", "keys", "ls", key=admin).stdout)
    assert [(key["name"], key["tenant"], key["scopes"]) for key in listed] == [
        ("ops", "default", ["admin"]),
        ("ci", "team-a", ["inference", "sessions"]),
    ]
    assert secret not in json.dumps(listed)
    assert "another API key" in dormouse(server, "keys", "create", "ci", key=admin, fails=True).stderr
    assert ask(server, secret).usage.completion_tokens == 2
    server.restart()
    assert ask(server, secret).usage.completion_tokens == 2
    server.stop()
    dormouse(server, "keys", "revoke", "ci")
    server.start()
    with pytest.raises(openai.AuthenticationError):
        ask(server, secret)
    assert "no API key 'ci'" in dormouse(server, "keys", "revoke", "ci", key=admin, fails=True).stderr


def test_a_revoked_key_is_refused_from_the_next_request_on(locked, start):
    server, admin = locked
    secret = create(server, "short", key=admin)
    assert server.openai(api_key=secret).models.list().data
    dormouse(server, "keys", "revoke", "short", key=admin)
    with pytest.raises(openai.AuthenticationError) as caught:
        server.openai(api_key=secret).models.list()
    assert caught.value.code == "invalid_api_key" and "revoked" in str(caught.value)
    # Also where none is needed: who sends a revoked key should learn of it.
    open_server = start()
    assert open_server.openai().models.list().data
    secret = create(open_server, "short")
    dormouse(open_server, "keys", "revoke", "short")
    with pytest.raises(openai.AuthenticationError):
        open_server.openai(api_key=secret).models.list()


def test_a_key_may_do_what_its_scopes_say(locked):
    server, admin = locked
    inference = create(server, "talker", "--scope", "inference", key=admin)
    sessions = create(server, "keeper", "--scope", "sessions", key=admin)

    def refused(secret, call):
        with pytest.raises(openai.PermissionDeniedError) as caught:
            call(server.openai(api_key=secret))
        assert caught.value.code == "insufficient_scope"
        return str(caught.value)

    assert ask(server, inference).choices
    for path in ["/sessions", "/conversations/conv_1", "/keys"]:
        refused(inference, lambda client: client.get(path, cast_to=object))
    assert "'sessions'" in refused(inference, lambda client: client.get("/sessions", cast_to=object))
    assert "'sessions'" in refused(inference, lambda _: ask(server, inference, extra_body={"session": "mine"}))
    converse = {"model": MODEL, "input": "x", "conversation": "conv_1"}
    assert "'sessions'" in refused(inference, lambda client: client.responses.create(**converse))
    assert "'inference'" in refused(sessions, lambda _: ask(server, sessions))
    assert "'admin'" in refused(sessions, lambda client: client.get("/keys", cast_to=object))
    assert server.http.get("/metrics").status_code == 401
    for secret, status in [(inference, 403), (admin, 200)]:
        assert server.http.get("/metrics", headers={"Authorization": f"Bearer {secret}"}).status_code == status
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
    assert ask(server, admin).choices


def test_tenants_see_nothing_of_each_other(locked):
    server, admin = locked
    ann, bob = (create(server, name, "--tenant", name, key=admin) for name in ("ann", "bob"))
    of = {name: httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {secret}"}, timeout=600)
          for name, secret in [("ann", ann), ("bob", bob)]}
    # The same name twice: names are each tenant's own.
    ids = {name: client.post("/v1/sessions", json={"name": "notes"}).json()["id"] for name, client in of.items()}
    assert ids["ann"] != ids["bob"]
    for path in ["", "/items", "/turns", "/events"]:
        answer = of["bob"].get(f"/v1/sessions/{ids['ann']}{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "session_not_found")
    assert of["bob"].delete(f"/v1/sessions/{ids['ann']}").status_code == 404
    assert of["bob"].post(f"/v1/sessions/{ids['ann']}/turns", json={"input": "x"}).status_code == 404
    conversation = of["ann"].post("/v1/conversations", json={}).json()["id"]
    response = of["ann"].post("/v1/responses", json={"input": "Hi", "max_output_tokens": 2}).json()["id"]
    for path in [f"/v1/conversations/{conversation}", f"/v1/conversations/{conversation}/items",
                 f"/v1/responses/{response}", f"/v1/responses/{response}/input_items"]:
        assert of["ann"].get(path).status_code == 200
        assert of["bob"].get(path).status_code == 404, path
    for fields in [{"conversation": conversation}, {"previous_response_id": response}]:
        assert of["bob"].post("/v1/responses", json={"input": "x", **fields}).status_code == 404
    assert [session["id"] for session in of["ann"].get("/v1/sessions").json()["data"]][-1] == ids["ann"]
    for name, client in of.items():
        assert client.get("/v1/sessions/notes").json()["id"] == ids[name]


def cached(answer):
    return answer.usage.prompt_tokens_details.cached_tokens


def test_what_one_tenant_computed_is_never_another_tenants_cache(locked):
    server, admin = locked
    ann, bob, alike = (
        create(server, name, "--tenant", tenant, key=admin)
        for name, tenant in [("ann", "ann"), ("bob", "bob"), ("ann2", "ann")]
    )
    first = ask(server, ann)
    assert cached(first) == 0
    assert cached(ask(server, bob)) == 0 and cached(ask(server, admin)) == 0
    # Within the tenant it is shared, whichever key asks.
    assert cached(ask(server, alike)) >= first.usage.prompt_tokens - 1 - 64
    # A salt parts further.
    salted = {"extra_body": {"cache_salt": "a secret"}}
    assert cached(ask(server, ann, **salted)) == 0
    assert cached(ask(server, alike, **salted)) > 0
    assert cached(ask(server, ann, extra_body={"cache_salt": "another"})) == 0
    # It stays so on disk.
    server.restart()
    assert cached(ask(server, bob)) > 0
    eve = create(server, "eve", "--tenant", "eve", key=admin)
    assert cached(ask(server, eve)) == 0
    answers = {ask(server, secret).choices[0].message.content for secret in (ann, bob, eve, admin)}
    assert answers == {first.choices[0].message.content}


def test_limits_of_a_key_are_429_with_the_time_to_wait(locked):
    server, admin = locked
    rare = create(server, "rare", "--requests-per-minute", "2", key=admin)
    client = server.openai(api_key=rare)
    assert client.models.list().data and client.models.list().data
    with pytest.raises(openai.RateLimitError) as caught:
        client.models.list()
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30

    single = create(server, "single", "--concurrency", "1", key=admin)
    client = server.openai(api_key=single)
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    with pytest.raises(openai.RateLimitError) as caught:
        client.models.list()
    assert "at once" in str(caught.value)
    stream.close()
    harness.wait_until(lambda: allowed(client), "the place of a stream that was closed")


def allowed(client):
    try:
        return client.models.list().data
    except openai.RateLimitError:
        return None


def test_secrets_are_not_stored(locked):
    server, admin = locked
    secret = create(server, "hidden", key=admin)
    server.stop()
    for path in server.data_dir.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert secret.encode() not in content and bytes.fromhex(secret[3:]) not in content, path


def test_web_pages_may_ask_only_where_they_are_listed(start, server):
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    listed = start(flags=["--cors-origin", "https://app.example"])
    origin = {"Origin": "https://app.example"}
    answer = listed.http.options("/v1/chat/completions", headers={**origin, **preflight})
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"].lower() == "authorization"
    answer = listed.http.post("/v1/sessions", headers=origin, json={})
    assert answer.status_code == 201 and "x-request-id" in answer.headers["access-control-expose-headers"].lower()
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    other = {"Origin": "https://evil.example"}
    answer = listed.http.post("/v1/sessions", headers=other, json={})
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert "access-control-allow-origin" not in listed.http.options("/v1/sessions", headers={**other, **preflight}).headers
    # And by default nowhere.
    assert not [name for name in server.http.get("/v1/models", headers=origin).headers if "access-control" in name]
