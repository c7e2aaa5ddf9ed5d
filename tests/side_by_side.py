"""How `make test` runs in several processes: how many there are, what stays together, and that it begins with what
takes longest.

pytest finds these hooks through tests/conftest.py. docs/decisions/0063
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# What one process needs at most, with the services and runs that its tests start.
GIGABYTES_OF_A_PROCESS = 4
# Seconds that files of tests take, as the last whole run found them: `make test-times` writes it.
SECONDS = Path(__file__).with_name("seconds.json")
# Folders whose files run in one process, because they share a service that takes half a minute to start.
TOGETHER = ("tests/api/cli/",)


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
    """Whole units, the one that takes longest first; those that nobody has timed come last."""
    units = defaultdict[str, float](float)
    for file, took in seconds.items():
        units[unit_of(file)] += took
    items.sort(key=lambda item: -units[unit_of(item.nodeid)])


def unit_of(nodeid: str) -> str:
    """What runs in one process together with this test: its file, or a folder."""
    folder = next((folder for folder in TOGETHER if nodeid.startswith(folder)), "")
    return folder or nodeid.partition("::")[0]


class Scheduling(LoadFileScheduling):
    """xdist's own way to hand out whole files, with units in their place."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    """What hands out tests to the processes."""
    return Scheduling(config, log)
