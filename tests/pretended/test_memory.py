"""What runs are expected to take of a device's memory, held against what they take, byte by byte."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pretended.memory import CASES

ROOT = Path(__file__).parents[2]
# The try before the first step goes through the longest batch that the data can make; a run may never meet it.
TRIED = 1.25
# Sums of a step's passes that wait until they are read, 12 bytes for each pass and adapter, are not tried.
SUMS = 256
# Of the check on another base: activations and an allocator's rounding are added as a fifth.
EXPECTED = 1.3


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All cases, in a process of its own whose `lorainit` takes the pretended device for CUDA."""
    folder = tmp_path_factory.mktemp("memory")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.pretended.memory", folder, *CASES]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {one["case"]: one for one in found}


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES)
def test_no_step_evaluation_or_checkpoint_takes_more_than_the_try_before_the_first(
    measured: dict[str, dict[str, Any]], case: str
) -> None:
    steps, trial = measured[case]["steps"], measured[case]["trial"]
    assert steps <= trial + SUMS
    assert trial <= TRIED * steps


@pytest.mark.parametrize("case", CASES)
def test_a_second_base_takes_no_more_than_is_expected_before_it_is_loaded(
    measured: dict[str, dict[str, Any]], case: str
) -> None:
    taken = measured[case]["copy"]
    expected = measured[case]["expected"]
    assert expected
    assert all(taken <= one <= EXPECTED * taken for one in expected)


@pytest.mark.parametrize("case", CASES)
def test_an_initialization_takes_no_more_than_its_evidence_and_a_pass(
    measured: dict[str, dict[str, Any]], case: str
) -> None:
    """Of the evidence it is said before it is collected what it takes; what the passes take is tried after it."""
    assert measured[case]["evidence"] <= measured[case]["kept"] + measured[case]["passes"]
