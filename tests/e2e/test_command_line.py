"""The binary as a person at a terminal uses it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pexpect
import pytest

import harness

COMMANDS = [[], ["serve"], ["chat"], ["run"], ["sessions"], ["sessions", "ls"], ["sessions", "show"], ["sessions", "fork"],
            ["sessions", "park"], ["sessions", "rm"], ["models"], ["models", "ls"], ["models", "pull"],
            ["models", "inspect"], ["models", "pack"], ["bench"], ["bench", "resume"], ["bench", "perplexity"], ["doctor"]]


@pytest.fixture
def dormouse(server, tmp_path):
    """Runs a command against the shared server."""

    def dormouse(*arguments, expect=0, stdin=""):
        environment = {**os.environ, "DORMOUSE_DATA_DIR": str(server.data_dir), "HOME": str(tmp_path)}
        done = subprocess.run([harness.BINARY, *arguments], capture_output=True, text=True, env=environment,
                              input=stdin, timeout=harness.PATIENCE_SECONDS)
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
    for flag, value, hint in [("--port", "x", "invalid"), ("--disk-quota", "lots", "4GiB"), ("--threads", "0", "1.."),
                              ("--durability", "maybe", "power, process, none"), ("--ctx", "0", "1.."),
                              ("--kv-dtype", "f64", "f16, q8_0"), ("--activations", "int4", "int8, int16")]:
        said = dormouse("serve", flag, value, expect=2).stderr
        assert flag in said and value in said and hint in said, said
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
    command = [harness.BINARY, "run", "-p", "Say hello.", "--max-tokens", "4", "--temperature", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL,
                          timeout=harness.PATIENCE_SECONDS)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def starting(tmp_path, *arguments, **environment):
    """`dormouse serve` on its way, with an empty home."""
    environment = {**os.environ, "HOME": str(tmp_path), "DORMOUSE_DATA_DIR": str(tmp_path / "data"), **environment}
    return subprocess.Popen([harness.BINARY, "serve", "--port", "0", *arguments], env=environment, text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=lambda stop: stop.name)
def test_serve_can_be_stopped_while_it_reads_a_model_for_the_first_time(stop, tmp_path):
    # A file of holes that takes longer to read than anyone waits; were it read, the exit code would be 1.
    model = tmp_path / "huge.gguf"
    model.touch()
    os.truncate(model, 1 << 42)
    process = starting(tmp_path, "--model", str(model))
    assert "huge.gguf" in process.stderr.readline()
    process.send_signal(stop)
    said, _ = process.communicate(timeout=harness.PATIENCE_SECONDS)
    assert (process.returncode, said) == (0, "")


def test_serve_can_be_stopped_while_it_waits_for_a_download(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        source = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = starting(tmp_path, "--yes", "--model", "smollm2", HF_ENDPOINT=source, PIP_INDEX_URL=source)
        asked, _ = silent.accept()
        with asked:
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=harness.PATIENCE_SECONDS)
    assert (process.returncode, said) == (0, "")


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


def test_packed_weights_lie_beside_the_model_and_a_pack_that_is_damaged_is_made_again(dormouse, tmp_path):
    model = tmp_path / "copy.gguf"
    shutil.copy(harness.MODEL, model)
    first = json.loads(dormouse("models", "pack", str(model), "--json").stdout)["pack"]
    assert Path(first).parent == tmp_path and Path(first).name.startswith("copy.gguf.")
    whole = Path(first).read_bytes()
    for damage in (lambda file: file.truncate(1 << 20), lambda file: file.write(b"not a pack")):
        with open(first, "r+b") as file:
            damage(file)
        assert dormouse("models", "pack", str(model)).stdout.strip() == first
        assert Path(first).read_bytes() == whole


def test_both_precisions_of_activations_predict_a_text_alike(dormouse, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The dormouse sleeps through the winter, and wakes when the days grow long. " * 12)

    def perplexity(activations):
        command = ["bench", "perplexity", "--model", str(harness.MODEL), "--text", str(text), "--json"]
        return json.loads(dormouse(*command, "--activations", activations).stdout)

    int8, int16 = perplexity("int8"), perplexity("int16")
    assert int8["token_ids"] == int16["token_ids"] and int8["tokens"] > 100
    assert int8["numerics"] != int16["numerics"]
    assert abs(int8["perplexity"] / int16["perplexity"] - 1) < 0.05


def test_doctor_finds_a_healthy_system_healthy_and_a_damaged_page(start, tmp_path):
    server = start()
    server.create(name="story")
    server.turn("story", "Tell a story of a lighthouse. " * 12, max_tokens=4, temperature=0)
    server.stop()

    def doctor():
        environment = {**os.environ, "DORMOUSE_DATA_DIR": str(server.data_dir), "HOME": str(tmp_path)}
        command = [harness.BINARY, "doctor", "--model", str(harness.MODEL)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment,
                              timeout=harness.PATIENCE_SECONDS)
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
        return pexpect.spawn(str(harness.BINARY), ["chat", *arguments], env=environment, encoding="utf-8",
                             timeout=harness.PATIENCE_SECONDS, dimensions=(40, 200))

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
    # Whatever the model would say, and however fast: no answer ends before it is stopped.
    terminal = chat("--session", "interrupted", "--ignore-eos")
    terminal.expect("> ")
    for question in ("Count to a thousand.", "Hello again."):
        turns = len(server.turns("interrupted"))
        terminal.sendline(question)
        harness.wait_until(
            lambda: any(turn["output_text"] for turn in server.turns("interrupted")[turns:]), "the answer to begin"
        )
        terminal.sendintr()
        terminal.expect("stopped")
        terminal.expect("> ")
        turn = server.turns("interrupted")[turns]
        assert turn["status"] == "cancelled" and turn["output_text"]
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    assert terminal.wait() == 0
    turn = server.turn("interrupted", "Goodbye.", max_tokens=4)
    assert turn["status"] == "completed" and server.session("interrupted")["turns"] == 3


def test_a_chat_whose_server_is_killed_waits_for_it_and_shows_the_rest(start, tmp_path):
    server = start()
    server.create(name="story", seed=4)
    environment = {**os.environ, "DORMOUSE_DATA_DIR": str(server.data_dir), "HOME": str(tmp_path), "TERM": "dumb"}
    flags = ["--session", "story", "--ignore-eos", "--max-tokens", "200", "--temperature", "0"]
    terminal = pexpect.spawn(str(harness.BINARY), ["chat", *flags], env=environment, encoding="utf-8",
                             timeout=harness.PATIENCE_SECONDS, dimensions=(40, 200))
    terminal.expect("> ")
    terminal.sendline("Tell a story.")
    # The line as it was typed, then the answer's first words.
    terminal.expect("Tell a story.")
    terminal.expect("[a-z]{3}")
    said = terminal.before + terminal.after
    server.kill()
    terminal.expect("the server is gone")
    said += terminal.before
    # At another address: the data directory tells which.
    server.start()
    terminal.expect_exact("stops waiting)")
    terminal.expect("tokens restored")
    said += terminal.before
    terminal.expect("> ")
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    (turn,) = server.turns("story")
    assert turn["status"] == "completed" and turn["usage"]["completion_tokens"] == 200
    # Every letter once; the line may have been broken in the middle of a word.
    shown = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]|\d+ $", "", said)
    assert "".join(turn["output_text"].split()) == "".join(shown.split())
