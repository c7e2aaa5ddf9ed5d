"""The pretended GPU counts every wait of the host for CUDA, call by call, and none where the host does not wait."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretended.waited import CALLS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, int | str]:
    """All calls, in a process of its own: a pretended GPU stays in torch for good."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.pretended.waited"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
    waits: dict[str, int | str] = json.loads(done.stdout)
    return waits


@pytest.mark.parametrize("name", CALLS)
def test_the_host_waits_as_often_as_for_cuda(name: str, found: dict[str, int | str]) -> None:
    assert found[name] == CALLS[name][0]
