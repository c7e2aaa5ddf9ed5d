"""Recognizes errors that this host caused: a failing disk, or a limit of open files or processes that was reached.

The file that was read is not at fault then, because another host, or this one later, may be able to read it
(docs/decisions/0061). Code that blames a file for an `OSError` calls `is_host_failure` first. Loads no torch.
"""

import errno
import os

_NUMBERS = (
    errno.EIO,
    errno.EREMOTEIO,
    errno.ESTALE,  # a network file system whose server has changed
    errno.ENOTCONN,  # a file system whose process has ended (FUSE)
    errno.ENXIO,
    errno.EBADMSG,  # ext4 and XFS: a checksum is wrong
    errno.EUCLEAN,  # XFS: "Structure needs cleaning"
    errno.EROFS,  # Linux makes a file system read-only after errors on its disk
    errno.EMFILE,
    errno.ENFILE,
    errno.EAGAIN,  # the limit of processes is reached
)
# How libraries in Rust and C++ write such an error, in lower case.
_WORDS = (
    *(f"(os error {number})" for number in _NUMBERS),
    "input/output error",
    "remote i/o error",
    "stale file handle",
    "too many open files",
    "can't start new thread",  # Python, where the system's limit of processes is reached
)
_NOT_THERE = "No such file or directory: "  # safetensors' text for every file that it cannot open, for any reason


def is_host_failure(error: BaseException) -> bool:
    """Whether the host has failed. Full memory and full disks are recognized in `lorainit.runtime`.

    If safetensors reports an existing, readable file as missing, the host's limit of open files is the likely reason.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NUMBERS
    said = str(error)
    if isinstance(error, FileNotFoundError):
        return _is_there(said.partition(_NOT_THERE)[2])
    return isinstance(error, Exception) and any(words in said.lower() for words in _WORDS)


def _is_there(path: str) -> bool:
    return bool(path) and os.access(path, os.R_OK)
