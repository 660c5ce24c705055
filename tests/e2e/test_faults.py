"""Damage: every fault gives a clear message, keeps the content, and never a wrong word.

One data directory is prepared, with two sessions; each test damages a copy of it and compares with what the undamaged
one goes on to say.
"""

import errno
import os
import pathlib
import shutil
import struct
import subprocess

import openai
import pytest

import harness
from harness import Refused, Server, StartFailed, tokens_of

GREEDY = {"temperature": 0, "max_tokens": 16}
STORY = "Tell the story of the lighthouse keeper who counted ships. " * 8
# Bits to flip in each file; CI takes a few, more find more.
FLIPS = int(os.environ.get("DORMOUSE_TEST_FLIPS", 5))


class Prepared:
    """A data directory, closed cleanly or killed, and the truth about it."""

    def __init__(self, folder, clean, model=harness.MODEL):
        self.directory = folder / ("clean" if clean else "killed")
        with Server(self.directory, model) as server:
            server.start()
            server.create(name="story", seed=1)
            server.turn("story", STORY, **GREEDY)
            server.turn("story", "Who visits him?", **GREEDY)
            server.create(name="other", seed=2)
            server.turn("other", "What is the capital of Chad?", **GREEDY)
            server.post("/v1/sessions/story/fork", {"name": "branch"})
            self.content = content(server)
            server.stop() if clean else server.kill()
        with Server(harness.copy_data(self.directory, folder / f"{self.directory.name}-undamaged")) as server:
            server.start()
            self.continuation = continuation(server)
            assert self.continuation["story"][1]["recomputed_tokens"] == 0
        harness.remove_data(server.data_dir)


def content(server):
    """All that the user would miss."""
    names = ("story", "other", "branch")
    return {name: [item["message"] for item in server.items(name)] for name in names}


def continuation(server):
    """What each session says next, and its receipt."""
    said = {}
    for name in ("story", "other"):
        events = list(server.stream_turn(name, "What happens then?", **GREEDY))
        said[name] = (tokens_of(events), events[-1]["turn"]["dormouse"])
        assert events[-1]["turn"]["status"] == "completed", events[-1]
    return said


def assert_intact(server, prepared):
    """The content is there, and every session goes on as the undamaged one does; answers the receipts."""
    assert content(server) == prepared.content
    after = continuation(server)
    for name, (tokens, receipt) in after.items():
        assert tokens == prepared.continuation[name][0], (name, receipt)
    return {name: receipt for name, (_, receipt) in after.items()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """As kill -9 left it: the database's last words lie in its logs."""
    prepared = Prepared(tmp_path_factory.mktemp("faults"), clean=False)
    yield prepared
    harness.remove_data(prepared.directory)


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    """As a clean stop left it: all is in the database's files, and no log can mend them."""
    closed = Prepared(tmp_path_factory.mktemp("faults"), clean=True)
    yield closed
    harness.remove_data(closed.directory)


@pytest.fixture
def damaged(prepared, tmp_path):
    """A copy to damage."""
    return harness.copy_data(prepared.directory, tmp_path / "damaged")


@pytest.fixture(params=["killed", "closed"])
def either(request):
    return request.getfixturevalue({"killed": "prepared", "closed": "closed"}[request.param])


@pytest.fixture
def start_damaged(start):
    """Starts over a damaged copy, which must work: the database has a mirror, and pages are derived."""

    def start_damaged(directory, **options):
        try:
            return start(directory, **options)
        except StartFailed as failed:
            pytest.fail(f"the server does not start over damage that it can mend: {failed}")

    return start_damaged


def flip(path, offset, bit=0):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def slot_bytes(path):
    return struct.unpack_from("<Q", path.read_bytes()[:4096], 104)[0]


@pytest.mark.parametrize("keep", ["nothing", "part-of-header", "header", "one-slot", "slot-and-a-half", "all-but-a-byte"])
def test_a_truncated_page_file_costs_time_only(keep, damaged, prepared, start_damaged):
    pages = harness.page_file(damaged)
    size = slot_bytes(pages)
    length = {"nothing": 0, "part-of-header": 1000, "header": 4096, "one-slot": 4096 + size,
              "slot-and-a-half": 4096 + size * 3 // 2, "all-but-a-byte": pages.stat().st_size - 1}[keep]
    os.truncate(pages, length)
    server = start_damaged(damaged)
    receipts = assert_intact(server, prepared)
    if keep in ("nothing", "part-of-header"):
        assert "cannot be used" in server.stderr()
        assert list(pages.parent.glob("*.damaged-*"))
    if keep != "all-but-a-byte":
        assert receipts["story"]["recomputed_tokens"] > 0, receipts
        assert receipts["story"]["miss"]["reason"], receipts


def test_a_flipped_bit_in_a_page_is_noticed_and_the_page_computed_again(damaged, prepared, start_damaged, dice):
    pages = harness.page_file(damaged)
    size = slot_bytes(pages)
    # One bit in each of the first slots, which hold the sessions: somewhere in its rows.
    for slot in range(4):
        flip(pages, 4096 + slot * size + dice.randrange(size // 8) * 8, dice.randrange(8))
    server = start_damaged(damaged)
    receipts = assert_intact(server, prepared)
    assert receipts["story"]["recomputed_tokens"] > 0
    assert server.metric("dormouse_kv_damaged_total") > 0
    assert "damaged" in server.stderr() or "checksum" in server.stderr(), server.stderr()


@pytest.mark.parametrize("point", range(FLIPS))
def test_a_single_flipped_bit_anywhere_in_the_pages_changes_no_word(point, damaged, prepared, start_damaged, dice):
    pages = harness.page_file(damaged)
    flip(pages, 4096 + dice.randrange(4 * slot_bytes(pages)), dice.randrange(8))
    assert_intact(start_damaged(damaged), prepared)


@pytest.mark.parametrize("offset", [0, 9, 20, 50, 97, 4093])
def test_a_flipped_bit_in_the_page_files_header_sets_it_aside(offset, damaged, prepared, start_damaged):
    pages = harness.page_file(damaged)
    flip(pages, offset)
    server = start_damaged(damaged)
    assert "cannot be used" in server.stderr()
    assert len(list(pages.parent.glob("*.damaged-*"))) == 1
    receipts = assert_intact(server, prepared)
    assert receipts["story"]["recomputed_tokens"] > 64


def test_a_page_file_of_an_older_format_version_is_set_aside_by_name(damaged, prepared, start_damaged):
    pages = harness.page_file(damaged)
    header = bytearray(pages.read_bytes()[:4096])
    struct.pack_into("<I", header, 8, 0)
    struct.pack_into("<I", header, 4092, crc32c(header[:4092]))
    with open(pages, "r+b") as file:
        file.write(header)
    server = start_damaged(damaged)
    assert "version 0" in server.stderr(), server.stderr()
    assert_intact(server, prepared)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("lost", ["pages", "salt", "both"])
def test_lost_page_files_and_salts_cost_time_only(lost, damaged, prepared, start_damaged):
    if lost in ("pages", "both"):
        harness.page_file(damaged).unlink()
    if lost in ("salt", "both"):
        (damaged / "pages" / "default.salt").unlink()
    receipts = assert_intact(start_damaged(damaged), prepared)
    assert receipts["story"]["restored_tokens"] < 64
    assert receipts["story"]["recomputed_tokens"] > 64


@pytest.mark.parametrize("file", ["dormouse.db", "dormouse-mirror.db"])
@pytest.mark.parametrize("point", range(FLIPS))
def test_a_flipped_bit_anywhere_in_the_database_is_mended(file, point, either, tmp_path, start_damaged, dice):
    damaged = harness.copy_data(either.directory, tmp_path / "damaged")
    # After a kill, what was said last lies in the write-ahead logs: these are damaged as well.
    files = [path for path in (damaged / file, damaged / f"{file}-wal") if path.exists() and path.stat().st_size]
    target = dice.choice(files)
    offset, bit = dice.randrange(target.stat().st_size), dice.randrange(8)
    print(f"bit {bit} of byte {offset} of {target.name}, {target.stat().st_size} bytes")
    flip(target, offset, bit)
    assert_intact(start_damaged(damaged), either)


@pytest.mark.parametrize("file", ["dormouse.db", "dormouse-mirror.db"])
@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_truncated_database_is_mended_from_its_mirror(file, keep, closed, tmp_path, start_damaged):
    damaged = harness.copy_data(closed.directory, tmp_path / "damaged")
    path = damaged / file
    os.truncate(path, int(path.stat().st_size * keep) if keep < 1 else keep)
    server = start_damaged(damaged)
    assert_intact(server, closed)


@pytest.mark.parametrize("file", ["dormouse.db", "dormouse-mirror.db"])
def test_a_lost_database_is_made_again_from_the_other(file, damaged, prepared, start_damaged):
    for path in damaged.glob(f"{file}*"):
        path.unlink()
    assert_intact(start_damaged(damaged), prepared)


def test_two_damaged_databases_are_an_error_and_not_an_empty_start(damaged, start, prepared):
    for path in damaged.glob("dormouse*.db*"):
        if path.stat().st_size:
            path.write_bytes(b"\xa5" * path.stat().st_size)
    with pytest.raises(StartFailed) as failed:
        start(damaged)
    assert failed.value.code == 1
    assert "database" in failed.value.stderr and "damaged" in failed.value.stderr
    assert "panicked" not in failed.value.stderr


def test_a_second_server_on_the_same_directory_refuses_and_names_the_first(start, tmp_path):
    first = start(tmp_path / "data")
    first.create(name="mine")
    second = Server(tmp_path / "data")
    second.log_path = tmp_path / "second.stderr"
    with pytest.raises(StartFailed) as failed:
        second.start()
    assert failed.value.code == 1
    assert str(first.process.pid) in failed.value.stderr and first.url in failed.value.stderr
    assert first.session("mine")["status"] == "idle"
    # After kill -9 the directory is free at once.
    first.restart()
    assert first.session("mine")["status"] == "idle"


def other_weights(source, target):
    """The same architecture and tokenizer with one tensor's numbers changed: another model, as a new fine-tune is."""
    import gguf

    shutil.copyfile(source, target)
    reader = gguf.GGUFReader(target, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
    tensor.data[:] = tensor.data[::-1].copy()
    reader.data.flush()


def test_replaced_weights_are_noticed_and_the_tokens_are_the_new_models(start, tmp_path):
    model = tmp_path / "model.gguf"
    shutil.copyfile(harness.MODEL, model)
    server = start(tmp_path / "data", model=model)
    server.create(name="story")
    server.turn("story", STORY, **GREEDY)
    past = server.items("story")
    assert server.stop() == 0
    changed = tmp_path / "changed.gguf"
    other_weights(harness.MODEL, changed)
    os.replace(changed, model)
    server.start()
    assert server.items("story") == past
    events = list(server.stream_turn("story", "What then?", **GREEDY))
    receipt = events[-1]["turn"]["dormouse"]
    assert (receipt["restored_tokens"], receipt["miss"]["reason"]) == (0, "model_changed"), receipt
    assert receipt["recomputed_tokens"] > 64
    # A server that never saw the old weights, given the same tokens by hand, says the same.
    messages = [item["message"] for item in past] + [{"role": "user", "content": "What then?"}]
    fresh = start(tmp_path / "fresh", model=model)
    answer = fresh.post("/v1/chat/completions", {"messages": messages, **GREEDY})
    assert answer["choices"][0]["message"]["content"] == events[-1]["turn"]["output_text"]
    # And the old weights put back find the old pages, which nobody has harmed.
    server.stop()
    os.unlink(model)
    shutil.copyfile(harness.MODEL, model)
    server.start()
    server.post("/v1/sessions/story/rewind", {"to": server.turns("story")[0]["id"]})
    assert server.turn("story", "What then?", **GREEDY)["dormouse"]["recomputed_tokens"] == 0


def test_a_turn_killed_under_one_model_goes_on_under_another_without_its_pages(start, tmp_path):
    model = tmp_path / "model.gguf"
    shutil.copyfile(harness.MODEL, model)
    server = start(tmp_path / "data", model=model)
    session = server.create()
    stream = server.stream_turn(session, STORY, temperature=0, max_tokens=150, ignore_eos=True)
    seen = [next(stream) for _ in range(3)]
    prompt = server.http.get(f"/v1/sessions/{session}").json()["tokens"]
    # What was said is durable a moment later; only that is the same under another model.
    while server.http.get(f"/v1/sessions/{session}").json()["tokens"] < prompt + 16:
        seen.append(next(stream))
    server.kill()
    changed = tmp_path / "changed.gguf"
    other_weights(harness.MODEL, changed)
    os.replace(changed, model)
    server.start()
    turn = server.turns(session)[0]["id"]
    finished = server.finish(session, turn)
    assert finished["status"] == "completed", finished
    assert finished["dormouse"]["restored_tokens"] == 0 and finished["dormouse"]["exact"] is False, finished["dormouse"]
    assert harness.text_of(seen[:8]) == finished["output_text"][: len(harness.text_of(seen[:8]))]
    # Said once: from there on the session is the new model's.
    after = server.turn(session, "And then?", **GREEDY)["dormouse"]
    assert after["recomputed_tokens"] == 0 and after["exact"] is True and "miss" not in after, after


# A quota of two slots of 64 positions: the prompt alone needs more.
def test_a_full_quota_fails_the_turn_clearly_and_a_larger_one_goes_on(start, tmp_path, prepared):
    data = harness.copy_data(prepared.directory, tmp_path / "data")
    harness.page_file(data).unlink()
    server = start(data, flags=["--disk-quota", "4MiB"])
    failed = attempt(server, "story", "What happens then?")
    assert failed and any(word in failed.lower() for word in ("quota", "room", "space")), failed
    chat_fails_for_lack_of_room(server)
    assert content(server)["other"] == prepared.content["other"]
    assert server.http.get("/health").status_code in (200, 503)
    assert server.stop() == 0
    server.flags = []
    server.start()
    messages = [item["message"] for item in server.items("story")]
    assert messages[: len(prepared.content["story"])] == prepared.content["story"]
    # The failed turn's input may have stayed or not; without it the session goes on as it would have.
    server.post("/v1/sessions/story/rewind", {"to": server.turns("story")[1]["id"]})
    assert_intact(server, prepared)


def test_when_the_quota_is_full_pinned_sessions_keep_their_pages(start):
    # Room for sixteen slots: some eight sessions of two.
    server = start(flags=["--disk-quota", "24MiB"])
    request = {**GREEDY, "max_tokens": 4}
    restored = lambda name: server.post(f"/v1/sessions/{name}/resume", {"dry_run": True})["restored_tokens"]
    server.create(name="kept", pinned=True)
    server.create(name="kept_later")
    server.create(name="released", pinned=True)
    for name in ("kept", "kept_later", "released"):
        server.turn(name, f"{name}: {STORY}", **request)
    server.http.patch("/v1/sessions/kept_later", json={"pinned": True}).raise_for_status()
    server.http.patch("/v1/sessions/released", json={"pinned": False}).raise_for_status()
    before = {name: restored(name) for name in ("kept", "kept_later", "released")}
    server.restart()
    for number in range(12):
        server.turn(server.create(), f"{number}: {STORY}", **request)
    after = {name: restored(name) for name in before}
    assert after["kept"] == before["kept"] and after["kept_later"] == before["kept_later"], (before, after)
    assert after["released"] < before["released"], (before, after)
    turn = server.turn("kept", "And then?", **request)
    assert turn["dormouse"]["recomputed_tokens"] == 0, turn["dormouse"]
    # A pin that is gone holds nothing.
    server.http.delete("/v1/sessions/kept_later").raise_for_status()
    assert server.turn("released", "And then?", **request)["dormouse"]["miss"]["reason"] == "page_evicted"


def chat_fails_for_lack_of_room(server):
    """As the `openai` client sees it: a status where nothing was sent yet, else an error in the stream."""
    model = server.get("/v1/models")["data"][0]["id"]
    request = {"model": model, "messages": [{"role": "user", "content": STORY}], **GREEDY}
    with pytest.raises(openai.InternalServerError) as caught:
        server.openai().chat.completions.create(**request)
    assert (caught.value.status_code, caught.value.code) == (507, "out_of_space")
    with pytest.raises(openai.APIError) as caught:
        list(server.openai().chat.completions.create(stream=True, **request))
    assert caught.value.code == "out_of_space" and "room" in caught.value.message
    # Clients that read until [DONE] get it, and never a finish_reason.
    stream = server.http.post("/v1/chat/completions", json={"stream": True, **request}).text
    frames = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
    assert '"error"' in frames[-2] and frames[-1] == "[DONE]"
    assert all('"finish_reason":null' in frame for frame in frames[:-2])


def attempt(server, session, text):
    """What an attempted turn says went wrong, None when it went well."""
    try:
        turn = server.turn(session, text, **GREEDY)
    except Refused as refused:
        return refused.error["message"]
    return turn["error"] if turn["status"] == "failed" else None


@pytest.fixture
def small_disk(tmp_path):
    """A file system that has room for one extent of pages and hardly more."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", mount], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", mount], check=True)


def fill(directory, leave=0):
    """Takes what is left of the disk, but for `leave` bytes."""
    filler = directory / "filler"
    state = os.statvfs(directory)
    left = state.f_bavail * state.f_frsize - leave
    try:
        with open(filler, "wb", buffering=0) as file:
            for _ in range(max(0, left) // 4096):
                file.write(bytes(4096))
    except OSError as why:
        assert why.errno == errno.ENOSPC  # Full is full.
    return filler


@pytest.mark.parametrize("leave", [0, 20_000, 200_000])
def test_a_full_disk_during_a_turn_is_told_and_the_session_goes_on_when_there_is_room(leave, small_disk, start):
    server = start(small_disk / "data", flags=["--disk-quota", "70MiB"])
    server.create(name="full", seed=3)
    server.turn("full", "Name a bird.", **GREEDY)
    reference = server.post("/v1/sessions/full/fork", {"name": "reference"})
    said = [server.turn("reference", text, **GREEDY)["output_text"] for text in ("And a fish?", "And a tree?")]
    filler = fill(small_disk, leave)
    problems = [attempt(server, "full", text) for text in ("And a fish?",)]
    if leave == 0:
        assert problems[0] and any(word in problems[0].lower() for word in ("full", "room", "space")), problems
    assert server.process.poll() is None, server.stderr()
    assert len(server.items("reference")) == 6
    filler.unlink(missing_ok=True)
    harness.wait_until(lambda: server.session("full")["status"] != "in_progress", "the session to be free again")
    assert [item["message"]["content"] for item in server.items("full")][0] == "Name a bird."
    server.post("/v1/sessions/full/rewind", {"to": server.turns("full")[0]["id"]})
    assert [server.turn("full", text, **GREEDY)["output_text"] for text in ("And a fish?", "And a tree?")] == said
    # And the disk holds all of it.
    server.restart()
    assert len(server.items("full")) == 6
    assert reference["id"] == server.session("reference")["id"]


def test_a_disk_that_fills_in_the_middle_of_an_answer_loses_nothing(small_disk, start, tmp_path):
    undisturbed = start()
    undisturbed.create(name="full", seed=3)
    long = {"temperature": 0.8, "max_tokens": 100, "ignore_eos": True}
    whole = undisturbed.turn("full", "Tell a long story.", **long)
    server = start(small_disk / "data", flags=["--disk-quota", "70MiB"])
    server.create(name="full", seed=3)
    stream = server.stream_turn("full", "Tell a long story.", **long)
    seen = [next(stream) for _ in range(10)]
    filler = fill(small_disk)
    seen += list(stream)
    last = seen[-1]
    filler.unlink(missing_ok=True)
    harness.wait_until(lambda: server.session("full")["status"] != "in_progress", "the session to be free again")
    turn = server.turns("full")[0]
    # Whether it waited for room or gave up: what it said is what was to be said, and what was said is kept.
    text = harness.text_of(seen)
    assert whole["output_text"].startswith(text)
    assert whole["output_text"].startswith(turn["output_text"])
    if turn["status"] != "completed":
        assert turn["error"] and any(word in turn["error"].lower() for word in ("full", "room", "space")), turn
    else:
        assert turn["output_text"] == whole["output_text"]
    assert last["type"] in ("session.turn.completed", "session.turn.failed")
    assert server.turn("full", "Go on.", **GREEDY)["status"] == "completed"


def test_a_directory_that_cannot_be_made_is_an_error_that_names_it(tmp_path, start):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with pytest.raises(StartFailed) as failed:
        start(blocked)
    assert failed.value.code == 1 and str(blocked) in failed.value.stderr


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "cut", "header-only"])
def test_a_model_that_is_no_model_is_an_error_that_names_it(kind, tmp_path, start):
    model = tmp_path / "broken.gguf"
    whole = pathlib.Path(harness.MODEL)
    if kind == "empty":
        model.write_bytes(b"")
    elif kind == "text":
        model.write_text("this is not a model" * 100)
    elif kind in ("cut", "header-only"):
        with open(whole, "rb") as file:
            model.write_bytes(file.read(5_000_000 if kind == "cut" else 24))
    with pytest.raises(StartFailed) as failed:
        start(model=model)
    assert failed.value.code == 1
    assert "broken.gguf" in failed.value.stderr and "panicked" not in failed.value.stderr, failed.value.stderr
