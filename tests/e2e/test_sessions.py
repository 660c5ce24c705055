"""The sessions API: everything that a session can do while nothing goes wrong."""

import pytest

import harness
from harness import Refused, deltas, said, text_of, tokens_of

GREEDY = {"temperature": 0, "max_tokens": 24}


def refused(call, *arguments, **fields):
    with pytest.raises(Refused) as caught:
        call(*arguments, **fields)
    return caught.value


@pytest.fixture
def talk(server):
    """A session of two turns."""
    session = server.create(instructions="You are terse.", seed=42)
    server.turn(session, "Where does the Rhine begin, and where does it end? Tell me all of it.", **GREEDY)
    server.turn(session, "Which towns lie on it?", **GREEDY)
    return session


def test_a_session_is_created_shown_changed_listed_and_deleted(server):
    fields = {"name": "notes of today", "metadata": {"project": "x"}, "seed": 5, "pinned": True, "ttl_seconds": 3600}
    made = server.post("/v1/sessions", fields)
    assert made["id"].startswith("sess_") and len(made["id"]) >= 5 + 32
    assert {key: made[key] for key in fields} == fields
    assert (made["status"], made["tokens"], made["turns"]) == ("idle", 0, 0)
    assert server.session(made["id"]) == made == server.session("notes of today")
    change = {"name": None, "metadata": {"project": "y"}, "pinned": False}
    changed = server.http.patch(f"/v1/sessions/{made['id']}", json=change).json()
    assert {key: changed[key] for key in change} == change
    assert refused(server.session, "notes of today").status == 404
    assert server.http.delete(f"/v1/sessions/{made['id']}").json()["deleted"] is True
    assert refused(server.session, made["id"]).error["code"] == "session_not_found"
    assert server.http.delete(f"/v1/sessions/{made['id']}").status_code == 404


def test_a_name_belongs_to_one_session(server):
    session = server.create(name="taken")
    error = refused(server.create, name="taken")
    assert (error.status, error.error["code"]) == (409, "name_taken")
    server.http.delete(f"/v1/sessions/{session}")
    assert server.create(name="taken") != session


def test_the_list_is_paged_and_filtered_by_status(start):
    server = start()
    made = [server.create() for _ in range(5)]
    seen, after = [], {}
    while True:
        page = server.get("/v1/sessions", limit=2, **after)
        seen += [session["id"] for session in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert sorted(seen) == sorted(made) and len(seen) == 5
    turn = server.begin(made[0], "Tell a long story.", max_tokens=2000, ignore_eos=True)
    busy = server.get("/v1/sessions", status="in_progress")["data"]
    assert [(session["id"], session["active_turn"]) for session in busy] == [(made[0], turn)]
    assert len(server.get("/v1/sessions", status="idle")["data"]) == 4
    server.post(f"/v1/sessions/{made[0]}/turns/{turn}/cancel")


def test_a_turn_says_the_same_plain_streamed_and_in_the_background(server):
    ways = []
    for way in ("plain", "stream", "background"):
        session = server.create(seed=9)
        fields = {"temperature": 0.9, "max_tokens": 20}
        if way == "plain":
            turn = server.turn(session, "Sing.", **fields)
        elif way == "stream":
            events = list(server.stream_turn(session, "Sing.", **fields))
            assert [event["type"] for event in events[:2]] == ["session.turn.created", "session.turn.in_progress"]
            turn = events[-1]["turn"]
            assert text_of(events) == turn["output_text"]
        else:
            begun = server.begin(session, "Sing.", **fields)
            turn = server.finish(session, begun)
        assert turn["status"] == "completed"
        harness.assert_consistent(turn)
        ways.append((turn["output_text"], turn["usage"]["completion_tokens"], turn["finish_reason"]))
        assert server.get_turn(session, turn["id"])["output_text"] == turn["output_text"]
    assert ways[0] == ways[1] == ways[2]


def test_a_second_turn_computes_only_its_own_words(server, talk):
    before = server.session(talk)
    turn = server.turn(talk, "And which bridges?", **GREEDY)
    receipt = turn["dormouse"]
    assert receipt["restored_tokens"] >= before["kv_tokens"] and receipt["recomputed_tokens"] == 0
    assert turn["usage"]["prompt_tokens"] - receipt["restored_tokens"] < 25
    assert receipt["exact"] is True and receipt["tier"] == "ram"
    harness.assert_consistent(turn)


def test_reattaching_at_any_cut_gives_exactly_the_missing_events(server):
    session = server.create(seed=1)
    live = list(server.stream_turn(session, "Count from one to ten.", temperature=0.7, max_tokens=16))
    turn = live[-1]["turn"]["id"]
    assert [event["sequence_number"] for event in live] == sorted({event["sequence_number"] for event in live})
    for cut in [None, *(event["sequence_number"] for event in live)]:
        again = server.attach(session, turn, cut)
        missing = [event for event in live if cut is None or event["sequence_number"] > cut]
        assert [event.raw for event in again] == [event.raw for event in missing]


def test_several_clients_may_listen_to_a_running_turn_from_anywhere(server):
    session = server.create(seed=1)
    stream = server.stream_turn(session, "Tell me about bees.", temperature=0.7, max_tokens=40, ignore_eos=True)
    first = [next(stream) for _ in range(10)]
    turn = first[0]["turn"]
    late = list(server.stream_attach(session, turn, first[4]["sequence_number"]))
    whole = first + list(stream)
    assert [event.raw for event in late] == [event.raw for event in whole[5:]]
    assert [event.raw for event in server.attach(session, turn)] == [event.raw for event in whole]


def test_a_cancelled_turn_keeps_what_it_said_and_the_session_goes_on(server):
    session = server.create()
    stream = server.stream_turn(session, "Tell a long story.", max_tokens=2000, ignore_eos=True, temperature=0)
    seen = [next(stream) for _ in range(12)]
    turn = seen[0]["turn"]
    cancelled = server.post(f"/v1/sessions/{session}/turns/{turn}/cancel")
    seen += list(stream)
    assert seen[-1]["type"] == "session.turn.cancelled"
    assert cancelled["status"] == "cancelled" and cancelled["output_text"] == text_of(seen)
    assert server.items(session)[-1]["message"]["content"] == text_of(seen)
    assert server.session(session)["status"] == "idle"
    # A second cancel changes nothing.
    assert server.post(f"/v1/sessions/{session}/turns/{turn}/cancel")["output_text"] == text_of(seen)
    assert server.turn(session, "Go on.", **GREEDY)["status"] == "completed"


def test_a_session_turn_goes_on_when_its_client_leaves(server):
    session = server.create(seed=3)
    stream = server.stream_turn(session, "Tell me about trees.", temperature=0.7, max_tokens=40, ignore_eos=True)
    turn = next(stream)["turn"]
    stream.close()
    finished = server.finish(session, turn)
    assert finished["status"] == "completed" and finished["output_text"]


def test_a_fork_shares_everything_and_says_what_the_original_says(server, talk):
    counters = ("dormouse_prompt_tokens_computed_total", "dormouse_kv_committed_bytes_total", "dormouse_steps_total")
    before = [server.metric(name) for name in counters]
    fork = server.post(f"/v1/sessions/{talk}/fork", {"name": None})
    assert fork["forked_from"] == {"session": talk, "at": server.session(talk)["tokens"]}
    assert fork["dormouse"]["recomputed_tokens"] == 0
    session = server.session(talk)
    assert session["kv_tokens"] <= fork["dormouse"]["restored_tokens"] <= session["tokens"]
    # No forward pass, and not one byte of KV written.
    assert [server.metric(name) for name in counters] == before
    assert [item["message"] for item in server.items(fork["id"])] == [item["message"] for item in server.items(talk)]
    one = list(server.stream_turn(talk, "Which castles?", **GREEDY))
    other = list(server.stream_turn(fork["id"], "Which castles?", **GREEDY))
    assert tokens_of(one) == tokens_of(other)
    assert other[-1]["turn"]["dormouse"]["recomputed_tokens"] == 0


def test_branches_do_not_disturb_each_other(server, talk):
    fork = server.post(f"/v1/sessions/{talk}/fork")["id"]
    plain = server.post(f"/v1/sessions/{talk}/fork")["id"]
    alone = tokens_of(list(server.stream_turn(plain, "Which castles?", **GREEDY)))
    server.turn(fork, "Speak of something else entirely: cheese.", **GREEDY)
    assert tokens_of(list(server.stream_turn(talk, "Which castles?", **GREEDY))) == alone
    server.http.delete(f"/v1/sessions/{talk}")
    assert server.turn(fork, "More.", **GREEDY)["dormouse"]["recomputed_tokens"] == 0


def test_a_fork_at_a_turn_or_token_begins_there(server, talk):
    first_turn = server.turns(talk)[0]
    fork = server.post(f"/v1/sessions/{talk}/fork", {"at": first_turn["id"]})
    assert fork["turns"] == 1 and fork["tokens"] == first_turn["usage"]["total_tokens"]
    assert fork["dormouse"]["recomputed_tokens"] == 0
    again = server.turn(fork["id"], "Which towns lie on it?", **GREEDY)
    assert again["output_text"] == server.turns(talk)[1]["output_text"]
    at_token = server.post(f"/v1/sessions/{talk}/fork", {"at": 30})
    assert at_token["tokens"] == 30 and at_token["kv_tokens"] == 30
    assert refused(server.post, f"/v1/sessions/{talk}/fork", {"at": 10**6}).error["param"] == "at"


def test_rewind_and_generate_again_says_what_was_said_first(server):
    session = server.create(seed=77)
    server.turn(session, "Think of an animal.", temperature=0.8, max_tokens=20)
    middle = server.turns(session)[0]["id"]
    first = list(server.stream_turn(session, "Describe it.", temperature=0.8, max_tokens=30))
    rewound = server.post(f"/v1/sessions/{session}/rewind", {"to": middle})
    assert rewound["turns"] == 1 and len(server.items(session)) == 2
    again = list(server.stream_turn(session, "Describe it.", temperature=0.8, max_tokens=30))
    assert said(deltas(again)) == said(deltas(first))
    assert again[-1]["turn"]["dormouse"]["recomputed_tokens"] == 0
    kinds = [event["type"] for event in server.events(session)]
    assert kinds.count("session.rewound") == 1 and kinds.count("session.turn.completed") == 3


def test_a_busy_session_is_not_rewound_and_refuses_a_second_turn(server):
    session = server.create()
    turn = server.begin(session, "Tell a long story.", max_tokens=2000, ignore_eos=True)
    for call, body in (("rewind", {"to": 0}), ("turns", {"input": "Me too!"})):
        error = refused(server.post, f"/v1/sessions/{session}/{call}", body)
        assert error.status == 409 and turn in error.error["message"]
    server.post(f"/v1/sessions/{session}/turns/{turn}/cancel")


def test_park_gives_memory_back_and_resume_says_what_it_costs(server, talk):
    parked = server.post(f"/v1/sessions/{talk}/park")
    assert parked["tokens"] == server.session(talk)["tokens"]
    estimate = server.post(f"/v1/sessions/{talk}/resume", dry_run="true")
    receipt = server.post(f"/v1/sessions/{talk}/resume")
    for answer in (estimate, receipt):
        session = server.session(talk)
        assert session["kv_tokens"] <= answer["restored_tokens"] <= session["tokens"]
        assert answer["recomputed_tokens"] == 0 and answer["session"] == talk
    fork = server.post(f"/v1/sessions/{talk}/fork")["id"]
    plain = tokens_of(list(server.stream_turn(fork, "Which castles?", **GREEDY)))
    server.post(f"/v1/sessions/{talk}/park")
    assert tokens_of(list(server.stream_turn(talk, "Which castles?", **GREEDY))) == plain


def test_the_event_log_is_a_list_and_a_stream_that_goes_on(server):
    session = server.create()
    server.turn(session, "Hello.", **GREEDY)
    listed = server.events(session)
    assert [event["sequence_number"] for event in listed] == list(range(len(listed)))
    assert [event["type"] for event in listed] == [
        "session.created", "session.turn.created", "session.turn.completed"
    ]
    assert server.events(session, starting_after=1) == listed[2:]
    assert server.events(session, limit=1) == listed[:1]
    path = f"/v1/sessions/{session}/events"
    with server.http.stream("GET", path, params={"stream": "true", "starting_after": 0}) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data: "))
        assert [harness.Event(next(lines)[6:]) for _ in range(2)] == listed[1:]
        server.turn(session, "Again.", **GREEDY)
        assert harness.Event(next(lines)[6:])["type"] == "session.turn.created"
        assert harness.Event(next(lines)[6:])["type"] == "session.turn.completed"


def test_everything_is_still_there_after_a_restart(start):
    server = start()
    session = server.create(name="kept", metadata={"a": "b"}, instructions="You are terse.", seed=4)
    server.turn(session, "Where does the Danube begin, where does it end, and what lies between?", **GREEDY)
    fork = server.post(f"/v1/sessions/{session}/fork")["id"]
    paths = [f"/v1/sessions/{session}", f"/v1/sessions/{fork}", f"/v1/sessions/{session}/items",
             f"/v1/sessions/{session}/turns", f"/v1/sessions/{session}/events"]
    before = [server.get(path) for path in paths]
    assert server.stop() == 0
    server.start()
    assert [server.get(path) for path in paths] == before
    turn = server.turn("kept", "Which towns?", **GREEDY)
    assert turn["dormouse"]["restored_tokens"] >= before[0]["kv_tokens"]
    assert turn["dormouse"]["recomputed_tokens"] == 0 and turn["dormouse"]["exact"] is True


def test_a_turn_may_have_several_messages_and_its_own_roles(server):
    session = server.create()
    messages = [{"role": "user", "content": "My cat is called Tom."}, {"role": "user", "content": "How is it called?"}]
    turn = server.post(f"/v1/sessions/{session}/turns", {"input": messages, **GREEDY})
    assert turn["status"] == "completed"
    assert [item["message"]["role"] for item in server.items(session)] == ["user", "user", "assistant"]


def test_a_session_that_is_full_says_so_with_both_numbers_and_stays_usable(start):
    server = start(flags=["--ctx", "256"])
    session = server.create()
    error = refused(server.turn, session, "word " * 400, max_tokens=4)
    assert (error.error["code"], error.error["param"]) == ("context_length_exceeded", "input")
    assert "256" in error.error["message"] and "4" in error.error["message"]
    # An answer that fills the context ends there, by length.
    turn = server.turn(session, "Tell a long story.", temperature=0, ignore_eos=True)
    assert turn["finish_reason"] == "length"
    assert turn["usage"]["total_tokens"] in (256, 257)
    assert refused(server.turn, session, "More!").error["code"] == "context_length_exceeded"
    rewound = server.post(f"/v1/sessions/{session}/rewind", {"to": 0})
    assert rewound["tokens"] == 0
    assert server.turn(session, "Hello.", **GREEDY)["status"] == "completed"
