"""The NVIDIA GPUs that a process may use: which they are, and why CUDA cannot use them. Loads no torch.

The worker checks this before it takes a job, and a run before it starts, because otherwise a run that should use a GPU
would take days on the CPU and nobody would notice why.
"""

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"
NEEDED = "RUN_NEEDS_GPU"  # 1: a run of this process must not use the CPU instead of a GPU
# The oldest Linux driver for each major version of CUDA, from CUDA's release notes. Minor versions are compatible.
OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 0)}


def count_installed(root: Path = Path("/")) -> int:
    """How many GPUs have a device file here. Linux on Windows (WSL) has one file for all, so it counts as one."""
    numbered = [path for path in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return len(numbered) or int((root / "dev/dxg").exists())


def list_visible(root: Path = Path("/")) -> list[str]:
    """The GPUs that this process may use, as CUDA names them: numbers, or identities (also of MIG instances)."""
    count, asked = count_installed(root), _requested()
    return [] if not count else [str(i) for i in range(count)] if asked is None else asked


def explain_no_gpu(root: Path = Path("/")) -> str | None:
    """Why runs use the CPU although nothing is wrong, as part of a sentence; None if GPUs should be used."""
    asked = _requested()
    if not may_be_used():
        return f"{VISIBLE} names none" if is_hidden() else "the installed torch has no CUDA"
    return "this machine shows no NVIDIA GPU" if asked is None and not count_installed(root) else None


def is_hidden() -> bool:
    """Whether the environment hides all GPUs (`CUDA_VISIBLE_DEVICES` is empty)."""
    return _requested() == []


def may_be_used() -> bool:
    """Whether a GPU of this machine would be used: the installed torch has CUDA, and the GPUs are not hidden."""
    return cuda_of_torch() is not None and not is_hidden()


def is_needed() -> bool:
    """Whether the environment says that a run of this process needs a GPU."""
    return os.environ.get(NEEDED) == "1"


def find_problem(root: Path = Path("/")) -> str | None:
    """A sentence that says why GPUs that should be used cannot be; None if they can, or if none should be used.

    None should be used with a torch without CUDA, or with an empty `CUDA_VISIBLE_DEVICES`.
    """
    cuda = cuda_of_torch()
    if cuda is None or explain_no_gpu(root):
        return None
    if why := _find_name_problem(_requested() or [], count_installed(root)):
        return f"{VISIBLE} {why}."
    found, oldest = driver_version(root), OLDEST_DRIVER.get(int(cuda.partition(".")[0]))
    if found and oldest and _parse_version(found)[:2] < oldest:
        needed = ".".join(map(str, oldest))
        return f"The NVIDIA driver is {found}, and torch's CUDA {cuda} needs {needed} or newer: update the driver."
    return None


def _find_name_problem(names: Sequence[str], count: int) -> str | None:
    """What is wrong with names of GPUs on a machine with `count` of them. Checked here, because CUDA ignores all names
    from the first wrong one on without a message."""
    for name in names:
        if not (name.isdecimal() or re.fullmatch(r"(GPU|MIG)-[\w/-]+", name)):
            return f"names {name!r}, which is neither a number nor an identity (GPU-..., MIG-...)"
        if not count or (name.isdecimal() and int(name) >= count):
            what = f"GPU {name}" if name.isdecimal() else name
            return f"names {what}, and this machine shows {count or 'none'} (they count from 0)"
    if len({_kind(name) for name in names}) > 1:
        return (
            f"names GPUs in more than one way ({', '.join(names)}): CUDA reads the first way only, and one GPU may be"
            " there twice. Write all as numbers, or all as identities of one kind"
        )
    pairs = ((first, second) for index, second in enumerate(names) for first in names[:index])
    twice = next((second for first, second in pairs if _is_same(first, second)), None)
    return None if twice is None else f"names {twice} twice, and each GPU is used once"


def _kind(name: str) -> str:
    """The kind of a GPU's name, because CUDA accepts one kind in a list. MIG instances have an old and a new kind."""
    return "number" if name.isdecimal() else "MIG-GPU-" if name.startswith("MIG-GPU-") else name[:4]


def _is_same(first: str, second: str) -> bool:
    """Whether two names of one kind mean the same GPU. The beginning of an identity is enough, except in the older MIG
    names, which end in numbers."""
    if first.isdecimal():
        return int(first) == int(second)
    short, long = sorted((first.lower(), second.lower()), key=len)
    return short == long or ("/" not in short and long.startswith(short))


def driver_version(root: Path = Path("/")) -> str | None:
    """The NVIDIA driver's version; None if Linux does not show it."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"^NVRM version:.*?\s(\d+(?:\.\d+)+)\s", text, re.MULTILINE)
    return found[1] if found else None


def cuda_of_torch() -> str | None:
    """The CUDA version that the installed torch was built for; None without torch or CUDA.

    Read from a file, because loading torch takes seconds.
    """
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def _requested() -> list[str] | None:
    """The names in `CUDA_VISIBLE_DEVICES` as CUDA reads them, which is up to the first -1; None if it is not set."""
    if VISIBLE not in os.environ:
        return None
    names = [name.strip() for name in os.environ[VISIBLE].split(",")]
    end = next((i for i, name in enumerate(names) if not name or name.startswith("-")), len(names))
    return names[:end]


def _parse_version(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
