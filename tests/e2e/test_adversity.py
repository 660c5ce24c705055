"""Clients that dawdle, crowds that say nothing, clocks that jump."""

import resource
import socket
import threading
import time

import pytest

import harness
from harness import text_of, wait_until

CHAT = "/v1/chat/completions"
GREEDY = {"temperature": 0, "max_tokens": 16}
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 4}
MONTH = 30 * 24 * 3600


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=harness.PATIENCE_SECONDS)


def resident_bytes(server):
    for line in open(f"/proc/{server.process.pid}/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the system does not tell")


def test_clients_that_read_one_byte_a_second_cost_little_and_hold_nobody_up(start):
    server = start()
    server.http.post(CHAT, json=HELLO)
    before, over = resident_bytes(server), threading.Event()
    body = b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100, "ignore_eos": true, "stream": true}'
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    def dawdle():
        with connect(server) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.sendall(head + body)
            while not over.wait(1):
                assert connection.recv(1)

    slow = [threading.Thread(target=dawdle) for _ in range(12)]
    for thread in slow:
        thread.start()
    wait_until(lambda: server.metric("dormouse_turns_running") > 0, "the slow clients' turns to run")
    for _ in range(3):
        assert server.http.post(CHAT, json=HELLO).status_code == 200
    # The engine does not wait for who reads slowly.
    wait_until(
        lambda: server.metric("dormouse_turns_running") + server.metric("dormouse_turns_waiting") == 0,
        "all turns to be over",
    )
    assert resident_bytes(server) - before < 64 << 20
    over.set()
    for thread in slow:
        thread.join()
    assert server.http.post(CHAT, json=HELLO).status_code == 200


@pytest.mark.parametrize("files", [None, 400], ids=["many-files", "few-files"])
def test_thousands_of_connections_that_send_nothing_keep_nobody_out(files, start):
    limit = [] if files is None else ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh"]
    server = start(wrapper=limit)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2000 + 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, wanted)), hard))
    crowd = []
    try:
        for _ in range(min(2000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200)):
            crowd.append(connect(server))
        for _ in range(3):
            assert server.http.post(CHAT, json=HELLO).status_code == 200
        # A new client, too, and one that streams.
        fresh = server.openai().models.list().data
        assert fresh and list(server.stream_chat(**HELLO))
        assert server.http.get("/health").status_code == 200
    finally:
        for connection in crowd:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert server.http.post(CHAT, json=HELLO).status_code == 200


@pytest.mark.parametrize("offset", [MONTH, -MONTH], ids=["from-the-future", "from-the-past"])
def test_sessions_go_on_whatever_the_clock_said_when_they_were_made(offset, start):
    server = start(environment={"DORMOUSE_FAULT": f"clock-offset:{offset}"})
    session = server.create(name="old", seed=1, ttl_seconds=2 * 3600)
    first = server.turn(session, "Name a bird.", **GREEDY)
    stream = server.stream_turn(session, "Tell a long story.", temperature=0, max_tokens=60, ignore_eos=True)
    seen = [next(stream) for _ in range(8)]
    server.kill()
    # The clock is right again, and a turn hangs in the air.
    server.environment["DORMOUSE_FAULT"] = ""
    server.start()
    (interrupted,) = [turn for turn in server.turns(session) if turn["id"] != first["id"]]
    whole = server.finish(session, interrupted["id"])
    assert whole["status"] == "completed" and whole["output_text"].startswith(text_of(seen))
    # Another one made now: both are listed once, each page of the list leads to the next, and both go on.
    server.create(name="new")
    listed, after = [], {}
    while page := server.get("/v1/sessions", limit=1, **after)["data"]:
        listed.append(page[0]["name"])
        after = {"after": page[0]["id"]}
    assert sorted(listed) == ["new", "old"]
    for name in listed:
        assert server.turn(name, "And then?", **GREEDY)["status"] == "completed"
    events = [event["sequence_number"] for event in server.events(session, limit=1000)]
    assert events == sorted(set(events))
    # Used now, it counts from now.
    assert abs(server.session(session)["last_active_at"] - time.time()) < 3600
