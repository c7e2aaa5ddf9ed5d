"""Recognizes that /dev/shm, the memory that processes share, is full, and says what helps. Loads no torch.

It is a file system in memory with a limit of its own, 64 MiB in a container by default. NCCL, torch and PostgreSQL use
it. Their errors are those of a full disk, so without this check the operator would look for a full disk in vain.
"""

import errno

MORE = "shm_size in the compose file, or --shm-size of docker run, gives a container more"
FULL = f"There was no room left in /dev/shm, the memory that processes share ({MORE})."
_NO_ROOM = ("no space left on device", "os error 28)")
# Names of objects in /dev/shm that such an error mentions, in lower case; torch and multiprocessing put theirs there.
_NAMES = ("dev/shm", "shared memory", "shared_memory", "</torch_", "/psm_")
# Messages of NCCL and of torch's DataLoader that do not mention space.
_SAID = ("error while creating shared memory segment", "workers are out of shared memory")


def is_full(error: BaseException) -> bool:
    """Whether /dev/shm is full. Check this before `is_full_disk`, because both errors look the same otherwise."""
    said = str(error).lower()
    no_room = getattr(error, "errno", None) == errno.ENOSPC or any(words in said for words in _NO_ROOM)
    return any(words in said for words in _SAID) or (no_room and any(name in said for name in _NAMES))
