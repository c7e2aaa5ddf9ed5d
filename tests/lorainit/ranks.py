"""Several processes side by side, as those of a run on several devices."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_ranks(module: str, size: int, folder: Path) -> None:
    """Run `python -m MODULE RANK SIZE FOLDER` for each rank, and require that all end well."""
    every = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(size), str(folder)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    said = [process.communicate(timeout=600)[1] for process in every]
    assert [process.returncode for process in every] == [0] * size, said
