"""How `make test` runs in several processes: how many there are, and that long files of tests begin first.

pytest finds these hooks through tests/conftest.py. docs/decisions/0063
"""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

# What one process needs at most, with the services and runs that its tests start.
GIGABYTES_OF_A_PROCESS = 4
# Seconds that files of tests take, as the last whole run found them: `make test-times` writes it.
SECONDS = Path(__file__).with_name("seconds.json")


def processes(cores: int, free_bytes: int | None) -> int:
    """One more than cores, since many tests wait, but no more than memory allows (where that is known), and one at
    least.
    """
    fit = cores + 1 if free_bytes is None else free_bytes // (GIGABYTES_OF_A_PROCESS << 30)
    return max(1, min(cores + 1, fit))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """The same for this machine; what a container may use counts, not what its host has."""
    import torch

    from lorainit.runtime.devices import free_bytes
    from lorainit.runtime.process_tuning import usable_cpus

    return processes(usable_cpus(), free_bytes(torch.device("cpu")))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In each of several processes: the order in which files are handed out. One process keeps pytest's own order."""
    if hasattr(config, "workerinput"):
        sort_longest_first(items, json.loads(SECONDS.read_text()))


def sort_longest_first(items: list[pytest.Item], seconds: Mapping[str, float]) -> None:
    """Whole files, the one that takes longest first; those that nobody has timed come last."""
    items.sort(key=lambda item: -seconds.get(item.nodeid.partition("::")[0], 0.0))
