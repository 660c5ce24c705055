"""The binary as a person at a terminal uses it."""

import json
import os
import subprocess

import pexpect
import pytest

import harness

COMMANDS = [[], ["serve"], ["chat"], ["run"], ["sessions"], ["sessions", "ls"], ["sessions", "show"], ["sessions", "fork"],
            ["sessions", "park"], ["sessions", "rm"], ["models"], ["models", "ls"], ["models", "pull"], ["bench"],
            ["bench", "resume"], ["doctor"]]


@pytest.fixture
def dormouse(server, tmp_path):
    """Runs a command against the shared server."""

    def dormouse(*arguments, expect=0, stdin=""):
        environment = {**os.environ, "DORMOUSE_DATA_DIR": str(server.data_dir), "HOME": str(tmp_path)}
        done = subprocess.run([harness.BINARY, *arguments], capture_output=True, text=True, env=environment,
                              input=stdin, timeout=120)
        assert done.returncode == expect, (arguments, done.returncode, done.stdout, done.stderr)
        assert "panicked" not in done.stderr
        return done

    return dormouse


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command, dormouse):
    assert "Usage: dormouse" in dormouse(*command, "--help").stdout


def test_the_version_is_told(dormouse):
    assert dormouse("--version").stdout.startswith("dormouse ")


def test_wrong_flags_and_values_exit_with_2_and_a_hint(dormouse):
    assert "--port" in dormouse("serve", "--prot", "5", expect=2).stderr
    assert "serve" in dormouse("sevre", expect=2).stderr
    for flag, value in [("--port", "x"), ("--disk-quota", "lots"), ("--durability", "maybe")]:
        assert value in dormouse("serve", flag, value, expect=2).stderr
    assert dormouse(expect=2).stderr


def test_a_server_is_not_opened_to_the_network_without_a_key(tmp_path, dormouse):
    done = dormouse("serve", "--model", str(harness.MODEL), "--data-dir", str(tmp_path / "data"), "--host", "0.0.0.0",
                    "--port", "0", expect=1)
    assert "key" in done.stderr


def test_run_prints_an_answer(dormouse):
    answer = dormouse("run", "-p", "Say hello.", "--max-tokens", "8", "--temperature", "0").stdout
    assert answer.strip()
    piped = dormouse("run", "--max-tokens", "8", "--temperature", "0", stdin="Say hello.").stdout
    assert piped == answer
    assert "prompt" in dormouse("run", expect=1).stderr


def test_run_without_a_server_starts_its_own(tmp_path):
    environment = {**os.environ, "DORMOUSE_DATA_DIR": str(tmp_path / "data"), "HOME": str(tmp_path),
                   "DORMOUSE_MODEL": str(harness.MODEL)}
    command = [harness.BINARY, "run", "-p", "Say hello.", "--max-tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_sessions_are_listed_shown_forked_parked_and_removed(dormouse, server):
    session = server.create(name="by-hand")
    server.turn(session, "Hello!", max_tokens=4, temperature=0)
    listed = json.loads(dormouse("sessions", "ls", "--json").stdout)
    listed = listed["data"] if isinstance(listed, dict) else listed
    assert session in [entry["id"] for entry in listed]
    assert "by-hand" in dormouse("sessions", "ls").stdout
    assert "Hello!" in dormouse("sessions", "show", "by-hand").stdout
    fork = json.loads(dormouse("sessions", "fork", "by-hand", "--json").stdout)
    assert fork["forked_from"]["session"] == session
    dormouse("sessions", "park", "by-hand")
    dormouse("sessions", "rm", fork["id"])
    assert "no session" in dormouse("sessions", "show", fork["id"], expect=1).stderr


def test_models_are_listed(dormouse):
    assert "smollm2" in dormouse("models", "ls").stdout.lower()
    assert json.loads(dormouse("models", "ls", "--json").stdout)


def test_doctor_finds_a_healthy_system_healthy_and_a_damaged_page(start, tmp_path):
    server = start()
    server.create(name="story")
    server.turn("story", "Tell a story of a lighthouse. " * 12, max_tokens=4, temperature=0)
    server.stop()

    def doctor():
        environment = {**os.environ, "DORMOUSE_DATA_DIR": str(server.data_dir), "HOME": str(tmp_path)}
        command = [harness.BINARY, "doctor", "--model", str(harness.MODEL)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert "panicked" not in done.stderr
        return done

    healthy = doctor()
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    pages = harness.page_file(server.data_dir)
    with open(pages, "r+b") as file:
        file.seek(4096 + 1000)
        file.write(b"\xff" * 64)
    damaged = doctor()
    assert damaged.returncode == 1, damaged.stdout + damaged.stderr
    assert "damaged" in (damaged.stdout + damaged.stderr).lower() or "checksum" in damaged.stdout.lower(), damaged.stdout
    # And the server goes on over it.
    server.start()
    turn = server.turn("story", "Go on.", max_tokens=4)
    assert turn["status"] == "completed"


@pytest.fixture
def chat(server, tmp_path):
    """`dormouse chat` at a terminal."""

    def chat(*arguments):
        environment = {**os.environ, "DORMOUSE_DATA_DIR": str(server.data_dir), "HOME": str(tmp_path), "TERM": "dumb"}
        return pexpect.spawn(str(harness.BINARY), ["chat", *arguments], env=environment, encoding="utf-8", timeout=60,
                             dimensions=(40, 200))

    return chat


def test_a_chat_streams_its_answer_shows_the_receipt_and_is_resumed_by_name(chat, server):
    terminal = chat("--session", "terminal", "--max-tokens", "8")
    terminal.expect("> ")
    terminal.sendline("My name is Ada.")
    terminal.expect(r"\d+ tokens? restored|restored")
    terminal.expect("> ")
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    assert terminal.wait() == 0
    assert [item["message"]["role"] for item in server.items("terminal")] == ["user", "assistant"]
    known = server.session("terminal")["tokens"]
    terminal = chat("--session", "terminal", "--max-tokens", "8")
    terminal.expect("> ")
    terminal.sendline("What is my name?")
    terminal.expect("restored")
    terminal.expect("> ")
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    receipt = server.turns("terminal")[1]["dormouse"]
    assert receipt["restored_tokens"] >= known - 1 and receipt["recomputed_tokens"] == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_session(chat, server):
    # Bounded, or the second answer may go on for as long as the model likes.
    terminal = chat("--session", "interrupted", "--max-tokens", "400")
    terminal.expect("> ")
    terminal.sendline("Count to a thousand, in words, and leave nothing out.")
    harness.wait_until(
        lambda: any(turn["output_text"] for turn in server.turns("interrupted")), "the answer to begin"
    )
    terminal.sendintr()
    terminal.expect("stopped")
    terminal.expect("> ")
    (turn,) = server.turns("interrupted")
    assert turn["status"] == "cancelled" and turn["output_text"]
    terminal.sendline("Hello again.")
    terminal.expect("> ", timeout=120)
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    assert terminal.wait() == 0
    assert server.session("interrupted")["turns"] == 2
