"""What a broken invariant does: an engine that panics fails its requests, comes back by itself, and has lost nothing."""

import json
import subprocess
import threading

import openai
import pytest

import harness
from harness import Server, said, text_of, tokens_of, wait_until

GREEDY = {"temperature": 0, "max_tokens": 16}
# One token a step, so that a step is known to lie in the middle of an answer.
PLAIN = ["--speculation", "off"]
STORY = "Tell the story of the lighthouse keeper who counted ships. " * 8


@pytest.fixture
def breaking(tmp_path):
    """Starts servers whose engines may panic, which is what these tests are about."""
    servers = []

    def start(fault=None, data_dir=None, **options):
        environment = {"DORMOUSE_FAULT": fault} if fault else {}
        server = Server(data_dir or tmp_path / f"data{len(servers)}", environment=environment, **options)
        servers.append(server)
        return server.start()

    yield start
    for server in servers:
        if server.process:
            server.kill()
        harness.remove_data(server.data_dir)


def prepare(server):
    """A session with two turns, one of them after the other."""
    server.create(name="story", seed=1)
    server.turn("story", STORY, **GREEDY)
    server.turn("story", "Who visits him?", **GREEDY)


def steps(server):
    return int(server.metric("dormouse_steps_total"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What an engine that never broke says, and in how many steps the sessions were prepared."""
    with Server(tmp_path_factory.mktemp("reference") / "data", flags=PLAIN) as server:
        prepare(server.start())
        prepared = steps(server)
        events = list(server.stream_turn("story", "What happens then?", **GREEDY))
        assert events[-1]["turn"]["dormouse"]["recomputed_tokens"] == 0
        yield prepared, events


def status_of(server):
    answer = server.http.get("/health")
    return answer.status_code, answer.json().get("reason")


def doctor(server):
    """Exit code and report of `dormouse doctor`, which checks every page, of a server that was stopped."""
    assert server.stop() == 0
    command = [harness.BINARY, "doctor", "--json", "--model", harness.MODEL, "--data-dir", server.data_dir]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.parametrize("fault", ["engine-panic-in-step", "compute-panic-in-step"])
def test_a_panic_fails_the_running_turns_and_the_sessions_go_on_as_they_would_have(fault, breaking, reference):
    prepared, uninterrupted = reference
    # A prompt may take some steps more or fewer: they depend on how fast the machine is.
    server = breaking(f"{fault}:{prepared + 60}", flags=PLAIN)
    prepare(server)
    server.create(name="other", seed=2)
    events = list(server.stream_turn("other", STORY, ignore_eos=True, temperature=0, max_tokens=200))
    assert len(harness.deltas(events)) > 5 and events[-1]["type"] == "session.turn.failed"
    failed = events[-1]["turn"]
    assert failed["error_code"] == "turn_failed" and "restarted" in failed["error"], failed
    # What was durable of it is part of the session, and a part of what was told.
    assert failed["output_text"] and text_of(events).startswith(failed["output_text"])
    # The next request is served, and what was said before is as it was.
    assert server.turn("other", "Go on.", **GREEDY)["status"] == "completed"
    assert status_of(server) == (200, None)
    assert server.metric("dormouse_engine_restarts_total") == 1
    events = list(server.stream_turn("story", "What happens then?", **GREEDY))
    assert tokens_of(events) == tokens_of(uninterrupted) and said(events)[-2:] == said(uninterrupted)[-2:]
    receipt = events[-1]["turn"]["dormouse"]
    assert receipt["restored_tokens"] > 64 and receipt["recomputed_tokens"] == 0, receipt
    code, report = doctor(server)
    assert code == 0, report


def test_a_client_that_knows_no_sessions_gets_a_500_and_its_next_request_an_answer(breaking):
    server = breaking("engine-panic-in-step:3")
    request = {"model": server.get("/v1/models")["data"][0]["id"], **GREEDY}
    request["messages"] = [{"role": "user", "content": "Name a bird."}]
    with pytest.raises(openai.InternalServerError) as caught:
        server.openai().chat.completions.create(**request)
    assert (caught.value.status_code, caught.value.code) == (500, "turn_failed")
    assert server.openai().chat.completions.create(**request).choices[0].message.content
    assert server.metric("dormouse_engine_restarts_total") == 1


def test_many_turns_and_those_that_wait_all_end_and_all_sessions_go_on(breaking):
    server = breaking("engine-panic-in-step:12")
    names = [f"s{number}" for number in range(6)]
    for name in names:
        server.create(name=name)
    ends = {}

    def run(name):
        ends[name] = list(server.stream_turn(name, f"I am {name}. {STORY}", **GREEDY))[-1]

    threads = [threading.Thread(target=run, args=[name]) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(harness.PATIENCE_SECONDS)
    assert {event["type"] for event in ends.values()} <= {"session.turn.failed", "session.turn.completed"}
    assert "session.turn.failed" in {event["type"] for event in ends.values()}
    for name in names:
        assert server.session(name)["status"] in ("idle", "failed")
        # The input was acknowledged, so it is there.
        assert server.items(name)[0]["message"]["content"].startswith(f"I am {name}.")
        assert server.turn(name, "And then?", **GREEDY)["status"] == "completed"


def test_an_engine_that_breaks_again_and_again_stays_down_and_says_so(breaking):
    server = breaking("engine-panic-every-steps:1")
    for attempt in range(4):
        turn = server.turn(server.create(), "Hello", **GREEDY)
        assert turn["status"] == "failed", turn
    status, reason = wait_until(lambda: status_of(server)[0] == 503 and status_of(server), "health to turn red")
    assert "panicked 4 times" in reason and "restart the server" in reason
    # What needs no engine is answered, and the next start goes on.
    assert len(server.get("/v1/sessions")["data"]) == 4
    assert server.metric("dormouse_healthy") == 0
    assert server.turn(server.get("/v1/sessions")["data"][0]["id"], "Hello", **GREEDY)["status"] == "failed"
    assert server.stop() == 0
    server.environment.pop("DORMOUSE_FAULT")
    server.start()
    assert server.turn(server.get("/v1/sessions")["data"][0]["id"], "Hello", **GREEDY)["status"] == "completed"


def test_a_stuck_step_turns_health_red_by_name_and_green_when_it_ends(breaking):
    server = breaking("slow-step:2:6000", flags=["--stuck-after", "1"])
    session = server.create()
    stream = server.stream_turn(session, STORY, **GREEDY)
    next(stream)
    status, reason = wait_until(lambda: status_of(server)[0] == 503 and status_of(server), "health to turn red")
    assert "a step of" in reason and "rows has lasted" in reason and "limit is 1 s" in reason, reason
    # Metrics are served without the engine's thread.
    assert server.metric("dormouse_engine_healthy") == 0 and server.metric("dormouse_healthy") == 0
    assert list(stream)[-1]["type"] == "session.turn.completed"
    assert status_of(server) == (200, None)
    wait_until(lambda: "is over" in server.stderr(), "the log to say that it is over")
    assert server.stderr().count("rows has lasted") == 1, server.stderr()
    assert server.metric("dormouse_stuck_total") == 1


def test_a_disk_that_does_not_answer_is_named_and_nothing_is_lost(breaking):
    server = breaking("commit-delay:3000", flags=["--stuck-after", "1"])
    session = server.create(seed=4)
    stream = server.stream_turn(session, "Tell a story.", temperature=0, max_tokens=24, ignore_eos=True)
    told = [next(stream) for _ in range(6)]
    status, reason = wait_until(lambda: status_of(server)[0] == 503 and status_of(server), "health to turn red")
    assert "a commit of" in reason and "has lasted" in reason, reason
    # Words come at the model's pace all the same; the end waits for the disk.
    told += list(stream)
    assert told[-1]["type"] == "session.turn.completed" and told[-1]["turn"]["usage"]["completion_tokens"] == 24
    server.environment.pop("DORMOUSE_FAULT")
    server.restart()
    assert server.turns(session)[0]["output_text"] == text_of(told)
    assert json.loads(json.dumps(server.turn(session, "Go on.", **GREEDY)))["dormouse"]["recomputed_tokens"] == 0
