"""Whole runs on a pretended GPU end well, a resumed one too, and the pretended GPU refuses what a real one would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WELL = ("ends checked", "the same bits", "factors differ by", "all refused", "2 put off, 0 batches cut")


def run(folder: Path, *names: str) -> list[dict[str, object]]:
    """What each case found, in a process of its own: its `lorainit` is not ours."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.pretended", folder, *names]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_a_run_goes_on_where_tensors_obey_cudas_rules(tmp_path: Path) -> None:
    refusals, resumed = run(tmp_path, "refusals", "resume AdamW")
    assert refusals["found"] == "all refused"
    assert resumed["found"] == "the same bits"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kind_of_run_ends_well_where_tensors_obey_cudas_rules(tmp_path: Path) -> None:
    for found in run(tmp_path):
        parts = str(found["found"]).split("; ")
        assert all("**" not in part and any(words in part for words in WELL) for part in parts), found
