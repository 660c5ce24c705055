"""The load generator, scaled down: what an hour of it would show as a leak shows here as growth."""

import subprocess
import sys

import pytest

import harness


@pytest.mark.parametrize("scenario", [["soak", "--seconds", "40"], ["kills", "--kills", "4"]], ids=lambda it: it[0])
def test_under_load_nothing_grows_and_nothing_is_lost(scenario):
    load = harness.REPOSITORY / "scripts/load"
    command = [sys.executable, load, *scenario, "--binary", harness.BINARY, "--model", harness.MODEL]
    run = subprocess.run(command, capture_output=True, text=True, timeout=harness.PATIENCE_SECONDS)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"| {scenario[0]} |" in run.stdout
