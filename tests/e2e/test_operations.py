"""What an operator sees and does: metrics, logs, request ids, settings that are read again."""

import json
import os
import signal
import time

from prometheus_client.parser import text_string_to_metric_families
import pytest

import harness
from harness import wait_until

GREEDY = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}
STORY = "Tell the story of the lighthouse keeper who counted ships. " * 8
SECRET = "Zanzibarquince"


def families(server):
    """The metrics, as Prometheus' own parser for Python reads them."""
    text = server.http.get("/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.name not in found, f"{family.name} is declared twice"
        assert family.type != "unknown" and family.documentation, family
        found[family.name] = family
    return found


def values(family, **labels):
    """The values of the family's samples with these labels."""
    found = [sample.value for sample in family.samples if labels.items() <= sample.labels.items()]
    assert found, (family.name, labels, family.samples)
    return found


def histogram(family):
    """Number and sum of what was observed; its buckets must be such."""
    named = lambda suffix: [sample for sample in family.samples if sample.name == family.name + suffix]
    buckets = [(float(sample.labels["le"]), sample.value) for sample in named("_bucket")]
    assert buckets == sorted(buckets) and buckets[-1][0] == float("inf")
    assert all(before[1] <= after[1] for before, after in zip(buckets, buckets[1:]))
    ((count,), (total,)) = ([sample.value for sample in named(suffix)] for suffix in ("_count", "_sum"))
    assert buckets[-1][1] == count and total >= 0
    return count, total


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    """A server with three turns behind it: two of one session, one of another that begins alike."""
    with harness.Server(tmp_path_factory.mktemp("worked") / "data", flags=["--speculation", "off"]) as server:
        server.start()
        session = server.create(name="story", seed=1)
        server.turn(session, STORY, **GREEDY)
        server.turn(session, "Who visits him?", **GREEDY)
        server.turn(server.create(name="other"), STORY, **GREEDY)
        yield server


def test_more_requests_than_may_be_on_their_way_are_told_to_come_again(start):
    server = start(flags=["--max-requests", "1"])
    stream = server.stream_turn(server.create(), STORY, temperature=0, max_tokens=400, ignore_eos=True)
    next(stream)
    refused = server.http.post("/v1/sessions/" + server.create() + "/turns", json={"input": "Hello"})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1"), refused.text
    assert refused.json()["error"]["code"] == "too_many_requests" and "1 answer" in refused.text
    assert len(list(stream)) > 0
    assert server.turn(server.create(), "Hello", **GREEDY)["status"] == "completed"


def test_prometheus_reads_every_metric_and_the_numbers_are_those_of_the_work_done(worked):
    metrics = families(worked)
    assert histogram(metrics["dormouse_queue_seconds"])[0] == 3
    assert histogram(metrics["dormouse_time_to_first_token_seconds"])[0] == 3
    # Of sixteen tokens each, fifteen come after another.
    count, total = histogram(metrics["dormouse_inter_token_seconds"])
    assert count == 45 and total > 0
    steps, rows = histogram(metrics["dormouse_step_rows"])
    assert values(metrics["dormouse_steps"]) == [steps] == [histogram(metrics["dormouse_step_seconds"])[0]]
    computed = values(metrics["dormouse_prompt_tokens_computed"])[0] + values(metrics["dormouse_output_tokens"])[0]
    assert rows == computed
    assert histogram(metrics["dormouse_restore_seconds"])[0] == 2
    assert histogram(metrics["dormouse_commit_seconds"])[0] >= 3
    tiers = metrics["dormouse_turns_by_tier"]
    assert (values(tiers, tier="none"), values(tiers, tier="ram")) == ([1], [2])
    restored = metrics["dormouse_restored_tokens_by_tier"]
    assert values(restored, tier="ram") == values(metrics["dormouse_restored_tokens"])
    assert values(metrics["dormouse_kv_evictions"], reason="quota") == [0]
    assert values(metrics["dormouse_engine_healthy"]) == [1]
    assert values(metrics["dormouse_engine_restarts"]) == values(metrics["dormouse_stuck"]) == [0]


def test_what_is_written_is_counted_for_each_session_and_day_and_outlives_the_process(start):
    server = start()
    session = server.create(name="story")
    assert server.session(session)["bytes_written"] == 0
    server.turn(session, STORY, **GREEDY)
    first = server.session(session)
    # Keys and values of each position once, and the log.
    assert first["kv_bytes"] <= first["bytes_written"] <= 1.1 * first["kv_bytes"] + 10_000, first
    fork = server.post(f"/v1/sessions/{session}/fork", {"name": "fork"})
    assert fork["bytes_written"] == 0, "what is shared was written once"
    server.turn("fork", "And then?", **GREEDY)
    written = [server.session(name)["bytes_written"] for name in ("story", "fork")]
    assert written[0] == first["bytes_written"] and 0 < written[1] < written[0]
    assert server.metric("dormouse_written_bytes_today") == sum(written)
    assert server.metric("dormouse_process_written_bytes_total") > 0
    server.restart()
    assert [server.session(name)["bytes_written"] for name in ("story", "fork")] == written
    assert server.metric("dormouse_written_bytes_today") == sum(written)


def io_of(server):
    lines = open(f"/proc/{server.process.pid}/io").read().splitlines()
    counts = dict(line.split(": ") for line in lines)
    return int(counts["wchar"]), int(counts["write_bytes"])


def test_idle_sessions_cause_no_writes(start):
    server = start()
    for number in range(3):
        server.turn(server.create(), STORY, **GREEDY)
    server.http.close()

    def is_quiet():
        before = io_of(server)
        time.sleep(0.5)
        return io_of(server) == before

    wait_until(is_quiet, "the last writes to be over")
    before = io_of(server)
    time.sleep(3)
    assert io_of(server) == before


def test_tenants_are_counted_apart(start):
    server = start()
    key = server.post("/v1/keys", {"name": "a", "tenant": "team-a", "scopes": ["inference"]})["secret"]
    model = server.get("/v1/models")["data"][0]["id"]
    ask = {"model": model, "messages": [{"role": "user", "content": STORY}], "temperature": 0, "max_tokens": 4}
    usage = [server.openai(api_key=key).chat.completions.create(**ask).usage for _ in range(2)]
    own = server.openai().chat.completions.create(**ask).usage
    refused = server.http.get("/v1/sessions", headers={"authorization": f"Bearer {key}"})
    assert refused.status_code == 403
    metrics = families(server)
    of = lambda name, tenant: values(metrics[name], tenant=tenant, model=model)
    assert of("dormouse_tenant_turns", "team-a") == [2] and of("dormouse_tenant_turns", "default") == [1]
    assert of("dormouse_tenant_prompt_tokens", "team-a") == [2 * usage[0].prompt_tokens]
    assert of("dormouse_tenant_cached_tokens", "team-a") == [usage[1].prompt_tokens_details.cached_tokens]
    assert of("dormouse_tenant_output_tokens", "default") == [own.completion_tokens]
    answers = metrics["dormouse_http_requests"]
    assert values(answers, tenant="team-a", status="200") == [2]
    assert values(answers, tenant="team-a", status="403") == [1]


def test_a_request_keeps_its_clients_id_and_gets_one_where_that_cannot_be_used(server):
    ask = lambda request_id: server.http.get("/v1/models", headers={"x-request-id": request_id}).headers["x-request-id"]
    assert ask("trace-1:a.b_C") == "trace-1:a.b_C"
    for bad in ("", "with space", "new\tline", "x" * 129, "{}", "é".encode()):
        assert ask(bad).startswith("req_"), bad
    ids = {server.http.get("/v1/models").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


def test_the_event_log_names_the_request_of_a_turn(server):
    session = server.create()
    body = {"input": "Hello", "max_tokens": 2}
    server.http.post(f"/v1/sessions/{session}/turns", json=body, headers={"x-request-id": "mine-7"})
    kinds = {event["type"]: event["data"].get("request_id") for event in server.events(session)}
    assert kinds["session.turn.created"] == kinds["session.turn.completed"] == "mine-7", kinds
    assert kinds["session.created"].startswith("req_")


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_log_names_requests_and_never_says_what_was_said(form, start):
    flags = ["--json"] if form == "json" else []
    server = start(environment={"DORMOUSE_LOG": "info"}, flags=flags)
    http, headers = server.http, {"x-request-id": "known-1"}
    model = server.get("/v1/models")["data"][0]["id"]
    messages = [{"role": "user", "content": f"Say {SECRET}"}]
    assert http.post("/v1/chat/completions", json={"messages": messages, **GREEDY}, headers=headers).status_code == 200
    list(server.stream_chat(messages=messages, **GREEDY))
    tools = [{"type": "function", "function": {"name": SECRET, "parameters": {"type": "object"}}}]
    session = server.create(name="s", instructions=f"Be {SECRET}.", metadata={"about": SECRET})
    server.turn(session, f"What is {SECRET}?", tools=tools, **GREEDY)
    server.post("/v1/completions", {"model": model, "prompt": f"{SECRET} is", "max_tokens": 2})
    server.post("/v1/responses", {"model": model, "input": f"{SECRET}?", "max_output_tokens": 4})
    for broken in (
        {"messages": messages, "temperature": SECRET},
        {"messages": [{"role": SECRET, "content": SECRET}]},
        {"messages": messages, "model": SECRET},
        {"messages": messages, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": SECRET}}}},
    ):
        assert 400 <= http.post("/v1/chat/completions", json=broken).status_code < 500
    assert http.post("/v1/chat/completions", content=f'{{"messages": {SECRET}').status_code == 400
    http.get("/v1/sessions", params={"after": SECRET})
    server.stop()
    log = server.stderr()
    assert SECRET not in log, [line for line in log.splitlines() if SECRET in line]
    if form == "text":
        (line,) = [line for line in log.splitlines() if "known-1" in line and "answered" in line]
        assert "/v1/chat/completions" in line and "status=200" in line and 'turn="turn_' in line
    else:
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        (line,) = [line for line in lines if line.get("span", {}).get("id") == "known-1"]
        assert line["fields"]["status"] == 200 and line["span"]["path"] == "/v1/chat/completions"
        assert line["span"]["turn"].startswith("turn_")


def hang_up(server, word):
    """Sends SIGHUP and waits until the log says what came of it."""
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: word in server.stderr(), "the settings to be read again", 60)
    return server.stderr()


def test_settings_that_can_change_do_so_on_sighup_and_the_others_are_named(start, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('cors_origin = "https://one.example"\ndisk_quota = "64MiB"\nstuck_after = 30\n')
    server = start(flags=["--config", file])
    session = server.create()
    server.turn(session, "Hello", **GREEDY)
    # As a page of that origin does, which may change something or not.
    change = lambda origin: server.http.post(
        f"/v1/sessions/{session}/park", headers={"origin": f"https://{origin}.example"}
    ).status_code
    quota = lambda: values(families(server)["dormouse_kv_slots"], state="quota")[0]
    assert (change("one"), change("two")) == (200, 403)
    before = quota()
    file.write_text('cors_origin = "https://two.example"\ndisk_quota = "128MiB"\nstuck_after = 60\nlog = "info"\nthreads = 1\n')
    log = hang_up(server, "need a restart")
    assert "changed: log, cors_origin, disk_quota, stuck_after" in log and "need a restart: threads" in log, log
    assert (change("one"), change("two")) == (403, 200)
    preflight = {"origin": "https://two.example", "access-control-request-method": "POST"}
    allowed = server.http.options("/v1/sessions", headers=preflight).headers
    assert allowed["access-control-allow-origin"] == "https://two.example"
    wait_until(lambda: quota() >= 2 * before - 1, "the quota to grow")
    assert "answered" in server.stderr(), "the log tells of requests now"
    # A mistake in the file changes nothing, and is told.
    file.write_text('cors_origin = "https://three.example"\nprot = 1\n')
    log = hang_up(server, "stay as they are")
    assert "prot" in log
    assert (change("two"), change("three")) == (200, 403)
    assert server.turn(session, "Go on.", **GREEDY)["dormouse"]["recomputed_tokens"] == 0
    assert os.path.exists(f"/proc/{server.process.pid}")
