"""Recognizes that /dev/shm, the memory that processes share, is full, and says what helps. Torch-free.

It lies in memory and has a limit of its own, in a container 64 MiB unless it is given more. NCCL, torch and
PostgreSQL use it. Their messages are those of a full disk, although no disk is full.
"""

import errno

MORE = "shm_size in the compose file, or --shm-size of docker run, gives a container more"
FULL = f"There was no room left in /dev/shm, the memory that processes share ({MORE})."
_NO_ROOM = ("no space left on device", "os error 28)")
# What an error without room names, in lower case: objects of torch and of Python's multiprocessing lie there, too.
_NAMES = ("dev/shm", "shared memory", "shared_memory", "</torch_", "/psm_")
# Messages of NCCL and of torch's DataLoader that do not mention space.
_SAID = ("error while creating shared memory segment", "workers are out of shared memory")


def is_full(error: BaseException) -> bool:
    """Whether /dev/shm has no room left. Ask before whether a disk is full: libraries say both alike."""
    said = str(error).lower()
    no_room = getattr(error, "errno", None) == errno.ENOSPC or any(words in said for words in _NO_ROOM)
    return any(words in said for words in _SAID) or (no_room and any(name in said for name in _NAMES))
