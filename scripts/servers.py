"""Dormouse and llama.cpp as servers to be compared: started, asked and stopped in one way, by one HTTP client.

llama.cpp comes from the PyPI package `xllamacpp`, its server as a prebuilt wheel, in a process of its own; or from a
`llama-server` of your own build.
"""

import dataclasses
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BINARY = ROOT / "target/release/dormouse"
MODEL = ROOT / "models/weights/SmolLM2-135M-Instruct.Q4_1.gguf"
START_SECONDS, REQUEST_SECONDS = 600, 3600
HOW_TO_GET_THE_PEER = (
    f"llama.cpp is not here. Either: {sys.executable} -m pip install xllamacpp (a prebuilt wheel of its server), "
    "or: --llama-server PATH (your own build)"
)

# The peer's process. Its time to start and its memory count from after Python and its imports, which a C++ server has not.
PEER = """
import json, sys, time
import xllamacpp
settings = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.port = settings["model"], settings["port"]
params.n_parallel, params.n_ctx = settings["parallel"], settings["parallel"] * settings["context"]
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
params.slot_save_path, params.endpoint_slots = settings["slots"] + "/", True
params.cache_ram_mib = settings["cache_ram"]
if settings["ubatch"]:
    params.n_ubatch = settings["ubatch"]
with open("/proc/self/status") as status:
    print(json.dumps({"begun": time.monotonic(), "status": status.read()}), flush=True)
server = xllamacpp.Server(params)
sys.stdin.read()
"""


class ServerFailed(Exception):
    """A server did not start, or answered with an error; the message says which, and what it printed."""


@dataclasses.dataclass
class Answer:
    """One streamed answer. Times are in seconds since before the connection was made."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    text: str = ""
    begun: float = 0.0  # on `time.monotonic`'s clock
    piece_times: list[float] = dataclasses.field(default_factory=list)  # when each piece of text came
    finished: float = 0.0  # when the reason of the end came
    engine_first_token: float = 0.0  # from when the engine had the turn, as Dormouse's receipt says

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens

    @property
    def first_token(self) -> float:
        # A token that is a part of a character makes no text: then the end is what there is to see.
        return self.piece_times[0] if self.piece_times else self.finished

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first."""
        if self.finished <= self.first_token:
            raise ServerFailed(f"an answer of {self.completion_tokens} tokens came all at once: no rate can be told")
        return (self.completion_tokens - 1) / (self.finished - self.first_token)


class Server:
    """A server in a process of its own; it may be started many times. `arguments` has model, threads and context."""

    name = ""

    def __init__(self, model: Path, threads: int, context: int, scratch: Path):
        self.model, self.threads, self.context, self.scratch = model, threads, context, scratch
        self.process, self.port, self.ready_s = None, 0, 0.0

    def command(self) -> list:
        raise NotImplementedError

    def start(self):
        """Starts it and waits until /health answers 200; `ready_s` is the time from exec to there."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command, log_path = [str(word) for word in self.command()], self.scratch / f"{self.name}.log"
        begun = time.monotonic()
        with open(log_path, "ab") as log:
            output = subprocess.PIPE if self.says_when_it_begins() else log
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=log, text=True)
        if self.says_when_it_begins():
            begun = self.hear_begin()
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() - begun > START_SECONDS:
                raise ServerFailed(f"{self.name} did not start ({' '.join(command)[:400]}):\n{self.last_words()}")
            time.sleep(0.001)
        self.ready_s = time.monotonic() - begun

    def says_when_it_begins(self) -> bool:
        return False

    def healthy(self) -> bool:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False  # nobody listens yet

    def last_words(self) -> str:
        return (self.scratch / f"{self.name}.log").read_text(errors="replace")[-2000:]

    def stop(self):
        """Ends it with SIGKILL."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            if self.process.stdout:
                self.process.stdout.close()
            self.process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def memory(self) -> dict[str, int]:
        """Resident bytes of the process: `total`, of it `anonymous` and `file` (mapped, the page cache's own copy)."""
        return _resident(Path(f"/proc/{self.process.pid}/status").read_text())

    def request(self, method: str, path: str, body: dict | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_SECONDS)
        try:
            connection.request(method, path, json.dumps(body or {}), {"Content-Type": "application/json"})
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise ServerFailed(f"{self.name}: {method} {path}: {error!r}\n{self.last_words()}") from error
        if response.status not in (200, 201):
            raise ServerFailed(f"{self.name}: {method} {path} answered {response.status}: {response.read()[:1000]}")
        return response

    def json(self, method: str, path: str, body: dict | None = None) -> dict:
        return json.load(self.request(method, path, body))

    def stream(self, messages: list[dict], max_tokens: int, **more) -> Answer:
        """One greedy chat answer of exactly `max_tokens` tokens, as it streams in."""
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        body |= {"stream_options": {"include_usage": True}} | self.chat_fields | more
        answer = Answer(begun=time.monotonic())
        for line in self.request("POST", "/v1/chat/completions", body):
            if not line.startswith(b"data: {"):
                continue
            now, event = time.monotonic() - answer.begun, json.loads(line[6:])
            if "error" in event:
                raise ServerFailed(f"{self.name}: {event['error']}")
            for choice in event["choices"]:
                if piece := choice["delta"].get("content") or choice["delta"].get("reasoning_content"):
                    answer.text += piece
                    answer.piece_times.append(now)
                if choice.get("finish_reason"):
                    answer.finished = now
            if usage := event.get("usage"):
                answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                answer.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
            if receipt := event.get("dormouse"):
                answer.engine_first_token = receipt["ttft_ms"] / 1e3
        if not answer.finished:
            raise ServerFailed(f"{self.name}: the answer broke off\n{self.last_words()}")
        return answer


class Dormouse(Server):
    """`speculation`: "off", or None for what the binary does by itself."""

    name = "dormouse"
    # Answers that nobody asks for again need no place on the disk.
    chat_fields = {"store": False}

    def __init__(self, binary: Path, *others, speculation: str | None = "off"):
        super().__init__(*others)
        self.binary = binary
        self.flags = ["--speculation", speculation] if speculation and speculates(binary) else []

    def command(self):
        settings = ["--threads", self.threads, "--ctx", self.context, "--data-dir", self.scratch / "data"]
        return [self.binary, "serve", "--model", self.model, "--port", self.port, *settings, *self.flags]

    def keep(self, messages: list[dict]) -> str:
        """Puts the conversation where a restart finds it, a named session, and answers the first token. Nothing is saved."""
        return self.stream(messages, 1, session="bench", store=True).text

    def go_on(self, messages: list[dict], answer: str, words: str) -> Answer:
        """One token in answer to a new message after `keep`."""
        return self.stream([{"role": "user", "content": words}], 1, session="bench", store=True)


class LlamaCpp(Server):
    """`parallel` slots of `context` tokens each. Prompts are read anew unless a request says `cache_prompt`; `cache_ram` MiB keep
    what left the slots."""

    name = "llama.cpp"
    chat_fields = {"cache_prompt": False}

    def __init__(self, native: Path | None, *others, parallel: int = 1, ubatch: int = 0, cache_ram: int = 0):
        super().__init__(*others)
        self.native, self.parallel, self.ubatch, self.cache_ram = native, parallel, ubatch, cache_ram
        self.own_memory = _resident("")

    def command(self):
        if self.native:
            command = [self.native, "--model", self.model, "--host", "127.0.0.1", "--port", self.port, "--slots"]
            command += ["--threads", self.threads, "--threads-batch", self.threads, "--parallel", self.parallel]
            command += ["--ctx-size", self.context * self.parallel, "--slot-save-path", self.scratch]
            command += ["--cache-ram", self.cache_ram]
            return command + (["--ubatch-size", self.ubatch] if self.ubatch else [])
        settings = {
            "model": str(self.model), "context": self.context, "threads": self.threads, "parallel": self.parallel,
            "port": self.port, "slots": str(self.scratch), "ubatch": self.ubatch, "cache_ram": self.cache_ram,
        }  # fmt: skip
        return [sys.executable, "-c", PEER, json.dumps(settings)]

    def says_when_it_begins(self) -> bool:
        return not self.native

    def hear_begin(self) -> float:
        line = self.process.stdout.readline()
        if not line:
            raise ServerFailed(f"{self.name} did not start:\n{self.last_words()}")
        hello = json.loads(line)
        self.own_memory = _resident(hello["status"])
        return hello["begun"]

    def memory(self) -> dict[str, int]:
        """Without what Python and the package's import take."""
        return {kind: amount - self.own_memory[kind] for kind, amount in super().memory().items()}

    def keep(self, messages: list[dict]) -> str:
        answer = self.stream(messages, 1, cache_prompt=True, id_slot=0)
        self.json("POST", "/slots/0?action=save", {"filename": "bench.slot"})
        return answer.text

    def go_on(self, messages: list[dict], answer: str, words: str) -> Answer:
        begun = time.monotonic()
        self.json("POST", "/slots/0?action=restore", {"filename": "bench.slot"})
        said = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": words}]
        result = self.stream(said, 1, cache_prompt=True, id_slot=0)
        # What the client waits for is both requests.
        restore_s = result.begun - begun
        result.piece_times = [restore_s + moment for moment in result.piece_times]
        result.finished += restore_s
        return result

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """`special`: the text is a rendered chat: parse control tokens, and add what the model begins every text with."""
        body = {"content": text, "add_special": special, "parse_special": special}
        return self.json("POST", "/tokenize", body)["tokens"]

    def logprob(self, prompt: list[int], token: int) -> float:
        """The log-probability of `token` behind `prompt`, out of the whole vocabulary, with nothing cut off or penalised."""
        # The bias makes the server say this token; what it reports is the probability before any bias.
        answer = self._say(prompt, token, listed=1)
        if "completion_probabilities" not in answer:
            # It does not report a token that ends inside a character: that one is looked up in the list of all.
            answer = self._say(prompt, self.tokenize("a")[0], listed=10**9)
        (said,) = answer["completion_probabilities"]
        found = [entry["logprob"] for entry in [said, *said["top_logprobs"]] if entry["id"] == token]
        if not found:
            raise ServerFailed(f"{self.name} names no probability for token {token}")
        return found[0]

    def _say(self, prompt: list[int], token: int, listed: int) -> dict:
        body = {"prompt": prompt, "n_predict": 1, "logit_bias": [[token, 1e6]], "n_probs": listed, "cache_prompt": True}
        body |= {"temperature": 1.0, "samplers": ["temperature"], "post_sampling_probs": False}
        return self.json("POST", "/completion", body)


def _resident(status: str) -> dict[str, int]:
    fields = dict(line.split(":", 1) for line in status.splitlines())
    names = {"total": "VmRSS", "anonymous": "RssAnon", "file": "RssFile"}
    return {kind: int(fields.get(name, "0 kB").split()[0]) * 1024 for kind, name in names.items()}


def speculates(binary: Path) -> bool:
    """Whether this binary can guess tokens ahead, and so can be told not to."""
    return "--speculation" in subprocess.run([str(binary), "serve", "--help"], capture_output=True, text=True).stdout


def peer_is_here(native: Path | None) -> bool:
    return native is not None or importlib.util.find_spec("xllamacpp") is not None


def peer_version(native: Path | None) -> dict:
    """Version and the instruction sets it was built for, as far as it says so."""
    if native:
        run = subprocess.run([str(native), "--version"], capture_output=True, text=True)
        return {"llama-server": str(native), "version": (run.stdout + run.stderr).strip()}
    code = "import xllamacpp, json; print(json.dumps([xllamacpp.__version__, xllamacpp.get_system_info()]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, system = json.loads(run.stdout.splitlines()[-1])
    return {"xllamacpp": version, "system": system.strip(" |")}


def add_arguments(parser):
    """What every comparison can be told."""
    parser.add_argument("--model", type=Path, default=MODEL, help="the GGUF file that both servers load")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of either server (default: all cores)")
    parser.add_argument("--binary", type=Path, default=BINARY, help="default: target/release/dormouse")
    parser.add_argument("--llama-server", type=Path, metavar="PATH", help="llama.cpp built by yourself, not xllamacpp")


def prepare(arguments):
    """Checks that all files are there; and lets SIGTERM end the script as an exception does, servers and files and all."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    remedies = {arguments.binary: "cargo build --release -p dormouse", arguments.model: "scripts/fetch_weights"}
    for path, remedy in remedies.items():
        if not path.exists():
            sys.exit(f"{path} does not exist: run {remedy}")
    if arguments.llama_server and not os.access(arguments.llama_server, os.X_OK):
        sys.exit(f"--llama-server {arguments.llama_server}: not a program that can be run")
