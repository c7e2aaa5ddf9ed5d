"""Several processes side by side, as those of a run on several devices."""

from pathlib import Path

from tests.lorainit.forked import Forked


def run_ranks(module: str, size: int, folder: Path) -> None:
    """Run `python -m MODULE RANK SIZE FOLDER` for each rank, and require that all end well."""
    every = [Forked([rank, size, folder], module=module) for rank in range(size)]
    said = [process.communicate(timeout=600)[1] for process in every]
    assert [process.returncode for process in every] == [0] * size, said
