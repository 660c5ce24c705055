"""The real binary under test: started, killed, stopped and asked, as a user would."""

import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import time

import httpx
import openai

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BINARY = pathlib.Path(os.environ.get("DORMOUSE_TEST_BINARY", REPOSITORY / "target/debug/dormouse"))
MODEL = pathlib.Path(
    os.environ.get("DORMOUSE_TEST_MODEL", REPOSITORY / "models/weights/SmolLM2-135M-Instruct.Q4_1.gguf")
)
# Only a hang is ever caught by this: it is far above what a slow machine under load needs with a debug build.
PATIENCE_SECONDS = 600


class StartFailed(Exception):
    """The process ended before it was ready."""

    def __init__(self, code, stderr):
        super().__init__(f"exit code {code}, standard error:\n{stderr}")
        self.code, self.stderr = code, stderr


class Server:
    """One `dormouse serve` over one data directory; it may be started many times."""

    def __init__(self, data_dir, model=MODEL, flags=(), environment=None, wrapper=()):
        # What runs the binary, if it is not run by itself.
        self.wrapper = list(wrapper)
        self.data_dir, self.model, self.flags = pathlib.Path(data_dir), pathlib.Path(model), list(flags)
        self.environment = {**os.environ, **(environment or {})}
        # Beside the data directory, so that a copy of the directory is the server's data and nothing else.
        self.log_path = self.data_dir.with_name(self.data_dir.name + ".stderr")
        self.port = 0
        self.process = self.http = self.url = None

    def start(self):
        command = [*self.wrapper, BINARY, "serve", "--model", self.model, "--data-dir", self.data_dir, "--port", self.port,
                   *self.flags]
        self.log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command], stdout=subprocess.PIPE, stderr=log, env=self.environment, text=True
            )
        readable, _, _ = select.select([self.process.stdout], [], [], PATIENCE_SECONDS)
        line = self.process.stdout.readline() if readable else ""
        if not line.startswith("ready "):
            if not readable:
                self.process.kill()
            code = self.process.wait()
            self.process = None
            raise StartFailed(code, self.stderr())
        self.url = line.split()[1]
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_SECONDS)
        return self

    def kill(self):
        """kill -9: nothing gets to say goodbye."""
        self.process.kill()
        return self._ended()

    def stop(self):
        """SIGTERM; answers the exit code."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE_SECONDS)
        return self._ended()

    def _ended(self):
        code = self.process.wait()
        self.process.stdout.close()
        if self.http:
            self.http.close()
        self.process = None
        return code

    def restart(self):
        self.kill()
        return self.start()

    def close(self):
        if self.process:
            self.kill()
        assert "panicked" not in self.whole_log(), self.whole_log()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def whole_log(self):
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def stderr(self):
        """What the process started last has said."""
        with open(self.log_path, "rb") as log:
            log.seek(self.log_start)
            return log.read().decode(errors="replace")

    def openai(self, max_retries=0, api_key="none"):
        base_url = f"{self.url}/v1"
        return openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=max_retries, timeout=PATIENCE_SECONDS)

    # The sessions API in one call each; an error answer fails the test with its text.

    def get(self, path, **params):
        return _checked(self.http.get(path, params=params))

    def post(self, path, body=None, **params):
        return _checked(self.http.post(path, json=body or {}, params=params))

    def create(self, **fields):
        return self.post("/v1/sessions", fields)["id"]

    def session(self, session):
        return self.get(f"/v1/sessions/{session}")

    def turn(self, session, text, **fields):
        """A finished turn."""
        return self.post(f"/v1/sessions/{session}/turns", {"input": text, **fields})

    def begin(self, session, text, **fields):
        """The id of a turn that goes on by itself."""
        return self.turn(session, text, background=True, **fields)["id"]

    def get_turn(self, session, turn):
        return self.get(f"/v1/sessions/{session}/turns/{turn}")

    def turns(self, session):
        return self.get(f"/v1/sessions/{session}/turns")["data"]

    def items(self, session):
        return self.get(f"/v1/sessions/{session}/items", limit=1000)["data"]

    def events(self, session, **params):
        return self.get(f"/v1/sessions/{session}/events", **params)["data"]

    def attach(self, session, turn, starting_after=None):
        """The turn's events to its end."""
        return list(self.stream_attach(session, turn, starting_after))

    def stream_attach(self, session, turn, starting_after=None):
        params = {"stream": "true"}
        if starting_after is not None:
            params["starting_after"] = starting_after
        return self._stream("GET", f"/v1/sessions/{session}/turns/{turn}", params=params)

    def stream_turn(self, session, text, **fields):
        return self._stream("POST", f"/v1/sessions/{session}/turns", json={"input": text, "stream": True, **fields})

    def stream_chat(self, **fields):
        return self._stream("POST", "/v1/chat/completions", json={"stream": True, **fields})

    def _stream(self, method, path, **arguments):
        with self.http.stream(method, path, **arguments) as response:
            if response.is_error:
                response.read()
                _checked(response)
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield Event(line[len("data: ") :])

    def finish(self, session, turn):
        """Waits for the turn's end and answers the turn."""
        last = self.attach(session, turn)[-1]
        return last["turn"]

    def metric(self, name):
        """A metric's value, summed over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name]
        assert values, f"no metric {name}"
        return sum(values)


class Event(dict):
    """An event's data, and the exact bytes that it came as."""

    def __init__(self, raw):
        super().__init__(json.loads(raw))
        self.raw = raw


class Refused(AssertionError):
    """The server answered with an error where the test wanted none, or wants to look at it."""

    def __init__(self, response):
        super().__init__(f"{response.request.method} {response.request.url}: {response.status_code} {response.text}")
        self.status, self.error = response.status_code, response.json()["error"]


def _checked(response):
    if response.is_error:
        raise Refused(response)
    return response.json()


def deltas(events):
    return [event for event in events if event["type"] == "session.turn.output_text.delta"]


def text_of(events):
    return "".join(event["delta"] for event in deltas(events))


def tokens_of(events):
    return [event["token"] for event in deltas(events)]


def said(events):
    """What a turn's events say, without the times and receipts of the last one."""
    return [{key: value for key, value in event.items() if key not in ("turn", "session")} for event in events]


def assert_consistent(turn):
    """Every prompt token was either restored or computed, and the client is told the same twice."""
    usage, receipt = turn["usage"], turn["dormouse"]
    assert usage["cached_tokens"] == receipt["restored_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert receipt["restored_tokens"] + receipt["recomputed_tokens"] <= usage["prompt_tokens"]


def wait_until(condition, what, seconds=PATIENCE_SECONDS):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain: {what}"
        time.sleep(0.02)
    return value


def copy_data(source, target):
    """A data directory's copy whose files are fully allocated, as the server's own are."""
    subprocess.run(["cp", "-a", "--sparse=never", str(source), str(target)], check=True)
    return pathlib.Path(target)


def remove_data(directory):
    shutil.rmtree(directory, ignore_errors=True)


def page_file(data_dir):
    (path,) = pathlib.Path(data_dir, "pages").glob("*.pages")
    return path
