"""Which GPUs and MIG instances the NVIDIA driver lists, from `nvidia-smi -L` if that is installed.

The driver is called in another process with a time limit, because a call into a driver that hangs never returns.
"""

import re
import shutil
from collections.abc import Sequence
from typing import NamedTuple

from lorainit.system.bounded_command import run_command

PROGRAM = "nvidia-smi"
ANSWER_SECONDS = 30.0  # without persistence mode the driver first starts each GPU, a second or two for each


class DriverSilent(Exception):
    """The driver has not answered in time; the message is a sentence."""


class Gpu(NamedTuple):
    """A GPU as the driver lists it."""

    identity: str
    instances: tuple[str, ...]  # identities of its MIG instances


def list_gpus() -> list[Gpu] | None:
    """The GPUs that the driver lists; None if nvidia-smi is missing or fails, because CUDA may work all the same.

    On a machine that has just started, this call also makes the driver create its files in /dev.

    Raises:
        DriverSilent: no answer within `ANSWER_SECONDS`.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        return None
    answer = run_command([program, "-L"], seconds=ANSWER_SECONDS)
    if answer is None:
        raise DriverSilent(
            f"The NVIDIA driver hangs: {PROGRAM} has not answered within {ANSWER_SECONDS:.0f} seconds."
            " Its messages are in the kernel's log (dmesg); restarting the machine often is the only cure."
        )
    return parse_gpu_list(answer.output) if answer.returncode == 0 else None


def parse_gpu_list(text: str) -> list[Gpu]:
    """Parse the output of `nvidia-smi -L`: a line for each GPU, followed by one for each of its MIG instances."""
    found = list[Gpu]()
    for identity in re.findall(r"\(UUID:\s*([^)\s]+)\)", text):
        if identity.startswith("GPU-"):
            found.append(Gpu(identity, ()))
        elif found:
            found[-1] = found[-1]._replace(instances=(*found[-1].instances, identity))
    return found


def find_name_problem(names: Sequence[str], gpus: Sequence[Gpu]) -> str | None:
    """What is wrong with the first name that does not identify one GPU or instance; None if all do.

    A name is an identity or its beginning. Numbers are not checked, because CUDA may count in another order than the
    driver.
    """
    known = [identity for gpu in gpus for identity in (gpu.identity, *gpu.instances)]
    for name in names:
        meant = [one for one in known if one.lower().startswith(name.lower())]
        if name.isdecimal() or len(meant) == 1 or name in meant:
            continue
        if meant:
            return f"names {name}, with which {len(meant)} identities begin: {', '.join(meant)}"
        return f"names {name}, and the driver lists {', '.join(known) or 'no GPU'}"
    return None
