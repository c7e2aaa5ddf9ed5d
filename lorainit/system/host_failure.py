"""Recognizes errors that this host caused: a disk that fails, or no more open files or processes.

Such an error says nothing about the file that was read: another host, or this one later, may read it
(docs/decisions/0061). Code that blames a file for an `OSError` calls `is_host_failure` first. Torch-free.
"""

import errno
import os

_NUMBERS = (
    errno.EIO,
    errno.EREMOTEIO,
    errno.ESTALE,  # of a network disk whose server has changed
    errno.ENOTCONN,  # of a file system whose process is gone (FUSE)
    errno.ENXIO,
    errno.EBADMSG,  # ext4 and XFS: a checksum is wrong
    errno.EUCLEAN,  # XFS: "Structure needs cleaning"
    errno.EROFS,  # what a disk becomes when its system has met errors on it
    errno.EMFILE,
    errno.ENFILE,
    errno.EAGAIN,  # no room for another process
)
# What Rust's libraries and those in C++ make of such a number, in lower case.
_WORDS = (
    *(f"(os error {number})" for number in _NUMBERS),
    "input/output error",
    "remote i/o error",
    "stale file handle",
    "too many open files",
    "can't start new thread",  # Python, where the system's limit of processes is reached
)
_NOT_THERE = "No such file or directory: "  # safetensors says it of each file that it cannot open


def is_host_failure(error: BaseException) -> bool:
    """Whether the host has failed, and not what was to be read or written. Memory and full disks are told elsewhere."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NUMBERS
    said = str(error)
    if isinstance(error, FileNotFoundError):
        return _is_there(said.partition(_NOT_THERE)[2])
    return isinstance(error, Exception) and any(words in said.lower() for words in _WORDS)


def _is_there(path: str) -> bool:
    return bool(path) and os.access(path, os.R_OK)
