"""How many processes `pytest -n auto` starts, which `make test N=auto` calls. docs/decisions/0063"""

import pytest

# What one process needs at most, with the services and runs that its tests start.
GIGABYTES_OF_A_PROCESS = 4


def processes(cores: int, free_bytes: int | None) -> int:
    """As many as cores, but no more than memory has room for (where that is known), and at least one."""
    room = cores if free_bytes is None else free_bytes // (GIGABYTES_OF_A_PROCESS << 30)
    return max(1, min(cores, room))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """The same for this machine; what a container may use counts, not what its host has."""
    import torch

    from lorainit.runtime.devices import free_bytes
    from lorainit.runtime.process_tuning import usable_cpus

    return processes(usable_cpus(), free_bytes(torch.device("cpu")))
