"""Turns go on after kill -9, and say what an uninterrupted turn says."""

import os
import socket
import threading
import time

import httpx
import openai
import pytest

import harness
from harness import Server, StartFailed, said, text_of, tokens_of

# Two pages of prompt, so that there is a prefill to kill; sampled, so that a lost RNG state would be seen.
PROMPT = "Here is what happened so far. " + " ".join(
    f"On day {day} the travellers crossed a river, met a stranger and lost a horse." for day in range(1, 7)
)
PROMPT += " Write the next chapter."
SEED = 20260
# Always 72 tokens, so that there is an answer to kill, too.
GENERATION = {"temperature": 0.8, "max_tokens": 72, "ignore_eos": True}
# The same, and so long that it is certainly on its way when it is interrupted.
LONG = {**GENERATION, "max_tokens": 4000}
# CI takes the twenty of the promise; more find more.
KILLS = int(os.environ.get("DORMOUSE_TEST_KILLS", 21))


class Reference:
    """What an undisturbed server says, and how long it takes to say it."""

    def __init__(self, folder):
        with Server(folder / "reference") as server:
            server.start()
            session = server.create(seed=SEED)
            began = time.monotonic()
            events, times = [], []
            for event in server.stream_turn(session, PROMPT, **GENERATION):
                events.append(event)
                times.append(time.monotonic() - began)
            self.events, self.text, self.tokens = events, text_of(events), tokens_of(events)
            # When the first and the last token came.
            self.first_seconds, self.whole_seconds = times[2], times[-1]
            # A turn with a past, for sessions that are killed in their second turn.
            follow = list(server.stream_turn(session, "Go on.", **GENERATION))
            self.follow_text, self.follow_tokens = text_of(follow), tokens_of(follow)
            self.turn = events[-1]["turn"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    reference = Reference(tmp_path_factory.mktemp("interrupted"))
    assert len(reference.tokens) > 50, "the reference answer is too short to be killed in"
    return reference


class Listener(threading.Thread):
    """A client that reads a stream until the server dies under it."""

    def __init__(self, stream):
        super().__init__(daemon=True)
        self.stream, self.events = stream, []

    def run(self):
        try:
            for event in self.stream:
                self.events.append(event)
        except httpx.HTTPError:
            pass

    def last_seen(self):
        return self.events[-1]["sequence_number"] if self.events else None


def assert_whole(events, reference):
    """Nothing is missing, nothing doubled, and all of it is what the undisturbed server said."""
    assert said(events) == said(reference.events)
    last = events[-1]["turn"]
    assert last["status"] == "completed"
    assert last["output_text"] == reference.text
    assert last["finish_reason"] == reference.turn["finish_reason"]
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][count] == reference.turn["usage"][count]


def assert_goes_on(server, session, turn, reference):
    """A long turn begins as the undisturbed one does, whose last words may be cut otherwise; and it is stopped."""
    stream = server.stream_attach(session, turn)
    told = [next(stream) for _ in reference.events[:-3]]
    stream.close()
    assert said(told) == said(reference.events[:-3])
    server.post(f"/v1/sessions/{session}/turns/{turn}/cancel")


def found_again(server, session):
    """The session's only turn after a kill; begun again where the kill came before its input was acknowledged."""
    turns = server.turns(session)
    return turns[0]["id"] if turns else server.begin(session, PROMPT, **GENERATION)


@pytest.mark.parametrize("point", range(KILLS))
def test_a_turn_killed_anywhere_goes_on_and_says_the_same(point, reference, start, dice):
    # A third of the points in the prefill (with the commit of its pages), the others over the answer and its end.
    if point % 3 == 0:
        delay = dice.uniform(0, reference.first_seconds * 1.1)
    else:
        delay = dice.uniform(reference.first_seconds, reference.whole_seconds * 1.05)
    server = start()
    session = server.create(seed=SEED)
    listener = Listener(server.stream_turn(session, PROMPT, **GENERATION))
    listener.start()
    time.sleep(delay)
    server.kill()
    listener.join()
    seen = listener.events
    server.start()
    turn = found_again(server, session)
    rest = server.attach(session, turn, listener.last_seen())
    if seen and "turn" in seen[-1] and seen[-1]["type"].endswith("completed"):
        assert rest == []
    assert_whole(seen + rest, reference)
    # The session's own state is whole too: two items, one turn, and the next turn stands on the right tokens.
    assert [item["message"]["role"] for item in server.items(session)] == ["user", "assistant"]
    assert server.items(session)[1]["message"]["content"] == reference.text
    kinds = [event["type"] for event in server.events(session)]
    assert kinds.count("session.turn.created") == 1 and kinds.count("session.turn.completed") == 1
    if point % 4 == 0:
        follow = list(server.stream_turn(session, "Go on.", **GENERATION))
        assert tokens_of(follow) == reference.follow_tokens


def test_a_turn_killed_again_and_again_says_the_same(reference, start, dice):
    server = start()
    session = server.create(seed=SEED)
    listener = Listener(server.stream_turn(session, PROMPT, **GENERATION))
    events, turn = listener.events, None
    for kill in range(6):
        listener.start()
        time.sleep(dice.uniform(0.1, reference.whole_seconds / 5))
        server.kill()
        listener.join()
        if kill:
            events = events + listener.events
        server.start()
        turn = turn or found_again(server, session)
        last_seen = events[-1]["sequence_number"] if events else None
        listener = Listener(server.stream_attach(session, turn, last_seen))
    events = events + list(listener.stream)
    assert_whole(events, reference)


def test_killed_work_is_not_computed_from_the_start_again(reference, start):
    server = start()
    session = server.create(seed=SEED)
    stream = server.stream_turn(session, PROMPT, **GENERATION)
    seen = [next(stream) for _ in range(40)]
    # A disk that is busy with other tests may take longer for a commit than forty tokens do.
    harness.wait_until(lambda: server.metric("dormouse_commits_total") > 0, "the prompt to be durable")
    server.kill()
    server.start()
    turn = found_again(server, session)
    rest = server.attach(session, turn, seen[-1]["sequence_number"])
    assert_whole(seen + rest, reference)
    # At most one page of 64 positions was without durable KV.
    assert rest[-1]["turn"]["dormouse"]["recomputed_tokens"] <= 64, rest[-1]["turn"]["dormouse"]
    assert server.metric("dormouse_prompt_tokens_computed_total") <= 64


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_a_chat_completion_in_a_session_goes_on_after_kill_9(fraction, reference, start):
    server = start()
    server.create(seed=1, name="story")
    fields = {"session": "story", "messages": [{"role": "user", "content": PROMPT}], "seed": SEED, **GENERATION}
    listener = Listener(server.stream_chat(**fields))
    listener.start()
    time.sleep(reference.whole_seconds * fraction)
    server.kill()
    listener.join()
    server.start()
    if server.turns("story"):
        turn = server.finish("story", server.turns("story")[0]["id"])
        assert (turn["status"], turn["output_text"]) == ("completed", reference.text)
    else:
        # The kill came before the request was acknowledged.
        assert listener.events == []


def test_a_background_turn_that_nobody_listens_to_finishes_by_itself(reference, start):
    server = start()
    session = server.create(seed=SEED)
    turn = server.begin(session, PROMPT, **GENERATION)
    time.sleep(reference.first_seconds + 0.3)
    server.kill()
    server.start()
    harness.wait_until(lambda: server.session(session)["status"] == "idle", "the turn's end")
    assert server.get_turn(session, turn)["output_text"] == reference.text
    assert_whole(server.attach(session, turn), reference)


def test_several_turns_at_once_all_go_on(reference, start):
    server = start()
    turns = {}
    for _ in range(3):
        session = server.create(seed=SEED)
        turns[session] = server.begin(session, PROMPT, **LONG)
    next(event for event in server.stream_attach(session, turns[session]) if "delta" in event)
    server.kill()
    server.start()
    assert "3 unfinished turns go on" in server.stderr()
    for session, turn in turns.items():
        assert_goes_on(server, session, turn, reference)


@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_sigterm_ends_at_once_with_success_and_the_turn_goes_on_later(where, reference, start):
    server = start()
    session = server.create(seed=SEED)
    turn = server.begin(session, PROMPT, **LONG)
    if where == "decode":
        next(event for event in server.stream_attach(session, turn) if "delta" in event)
    assert server.stop() == 0
    server.start()
    # At once: it was not waited for.
    assert "1 unfinished turns go on" in server.stderr()
    assert_goes_on(server, session, turn, reference)


def test_a_client_that_streams_while_sigterm_comes_sees_the_rest_later(reference, start):
    server = start()
    session = server.create(seed=SEED)
    listener = Listener(server.stream_turn(session, PROMPT, **GENERATION))
    listener.start()
    harness.wait_until(lambda: len(listener.events) > 20, "twenty events")
    assert server.stop() == 0
    listener.join()
    server.start()
    turn = server.turns(session)[0]["id"]
    assert_whole(listener.events + server.attach(session, turn, listener.last_seen()), reference)


def test_a_start_that_cannot_listen_leaves_interrupted_work_to_the_next(reference, start):
    server = start()
    session = server.create(seed=SEED)
    turn = server.begin(session, PROMPT, **LONG)
    server.kill()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server.port = taken.getsockname()[1]
        with pytest.raises(StartFailed) as failed:
            server.start()
    assert failed.value.code == 1 and "cannot listen" in failed.value.stderr
    server.port = 0
    server.start()
    assert_goes_on(server, session, turn, reference)


def test_a_client_that_tries_again_does_not_say_it_twice(reference, start):
    server = start()
    server.create(seed=SEED, name="story")
    # As it comes: it sends a request again when the server had trouble with it.
    client = server.openai(max_retries=2)
    model = client.models.list().data[0].id
    extension = {"session": "story", "ignore_eos": LONG["ignore_eos"]}
    fields = {"temperature": LONG["temperature"], "max_tokens": LONG["max_tokens"], "seed": SEED}
    caught = []

    def ask():
        messages = [{"role": "user", "content": PROMPT}]
        with pytest.raises(openai.InternalServerError) as error:
            client.chat.completions.create(model=model, messages=messages, extra_body=extension, **fields)
        caught.append(error.value)

    thread = threading.Thread(target=ask)
    thread.start()
    harness.wait_until(lambda: server.turns("story"), "the turn to begin")
    assert server.stop() == 0
    thread.join()
    assert (caught[0].status_code, caught[0].code) == (503, "turn_interrupted")
    server.start()
    (turn,) = server.turns("story")
    assert turn["id"] in caught[0].message
    assert [item["message"]["content"] for item in server.items("story")] == [PROMPT]
    assert_goes_on(server, "story", turn["id"], reference)


CHANGES = {
    "fork": lambda server, session: server.http.post(f"/v1/sessions/{session}/fork", json={}),
    "rewind": lambda server, session: server.http.post(f"/v1/sessions/{session}/rewind", json={"to": 150}),
    "park": lambda server, session: server.http.post(f"/v1/sessions/{session}/park"),
    "delete": lambda server, session: server.http.delete(f"/v1/sessions/{session}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_kill_during_a_change_leaves_it_done_or_undone_and_never_half(change, reference, start, dice):
    server = start()
    original = server.create(seed=SEED, name="original")
    server.turn(original, PROMPT, **GENERATION)
    for _ in range(4):
        victim = server.post(f"/v1/sessions/{original}/fork")["id"]
        before = server.session(victim)

        def act():
            try:
                for _ in range(3):
                    CHANGES[change](server, victim)
            except (httpx.HTTPError, RuntimeError):
                return  # The server, or the client that the kill closed, is gone.

        thread = threading.Thread(target=act)
        thread.start()
        time.sleep(dice.uniform(0, 0.03))
        server.kill()
        thread.join()
        server.start()
        listed = {session["id"]: session for session in server.get("/v1/sessions", limit=100)["data"]}
        if victim in listed:
            tokens = listed[victim]["tokens"]
            assert tokens in (before["tokens"], 150), (tokens, before)
            assert len(server.items(victim)) == (1 if tokens == 150 else 2)
        else:
            assert change == "delete"
        for session in listed.values():
            # A fork is the whole session or is not there.
            assert session["tokens"] in (before["tokens"], 150) and session["status"] == "idle"
            assert session["kv_tokens"] >= session["tokens"] - 1
    # Whatever happened around it, the original goes on as if nothing had.
    follow = list(server.stream_turn(original, "Go on.", **GENERATION))
    assert tokens_of(follow) == reference.follow_tokens
    assert text_of(follow) == reference.follow_text
