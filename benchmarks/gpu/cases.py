"""The cases of the pretended GPU (`tests/pretended`) on the real one, as `pytest -m gpu` runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.day import Day, held

ROOT = Path(__file__).parents[2]


def tests(day: Day) -> None:
    """What passed and what did not; on a processor, only how many there are."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/pretended"]
    command += [f"--basetemp={day.folder / 'pytest'}", *([] if day.has_gpu else ["--collect-only"])]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR", "SKIPPED")):
            day.say(f"- {held(line.startswith('SKIPPED'), line[:300])}")
    summary = next(
        (line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)|tests? collected", line)), ""
    )
    day.say(f"- {held(done.returncode == 0 and bool(summary), summary or done.stderr[-300:] or 'nothing was said')}")
