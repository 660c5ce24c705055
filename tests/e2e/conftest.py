"""What the end-to-end tests have in common."""

import os
import random
import sys

import pytest

import harness
from harness import Server


SEED = os.environ.get("DORMOUSE_TEST_SEED") or str(random.SystemRandom().randrange(10**6))


def pytest_report_header():
    return f"random points: DORMOUSE_TEST_SEED={SEED} plays them again"


def pytest_configure():
    if not harness.BINARY.exists():
        sys.exit(f"there is no {harness.BINARY}: run `cargo build -p dormouse`")
    if not harness.MODEL.exists():
        sys.exit(f"there is no {harness.MODEL}: run scripts/fetch_weights")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server for requests that leave it as it was; tests that kill or damage start their own."""
    with Server(tmp_path_factory.mktemp("shared") / "data") as server:
        yield server.start()


@pytest.fixture(autouse=True)
def the_shared_server_is_still_alive(request):
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        assert server.process.poll() is None, server.stderr()
        assert server.http.get("/health").json() == {"status": "ok"}


@pytest.fixture
def start(tmp_path):
    """Starts servers that are killed when the test ends, and checks that none of them panicked."""
    servers = []

    def start(data_dir=None, **options):
        server = Server(data_dir or tmp_path / f"data{len(servers)}", **options)
        servers.append(server)
        return server.start()

    yield start
    for server in servers:
        server.close()
        harness.remove_data(server.data_dir)


@pytest.fixture
def client(server):
    return server.openai()


@pytest.fixture
def dice(request):
    """Random points for kills and damage, a test's own: it can be played again alone."""
    return random.Random(f"{SEED} {request.node.name}")
