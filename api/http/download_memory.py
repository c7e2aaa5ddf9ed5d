"""How much of a file is read at once: little for who reads slowly or not at all, much for who reads fast.

Each download may hold `SMALL` bytes. What it holds beyond is lent to it from memory that all downloads of a process
share, so that many who read nothing cost little each, and nothing more in all.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from api.core.files.storage import BLOCK

SMALL = 256 * 1024
LARGE = BLOCK
QUICK_SECONDS = 1.0  # a block that was taken within this is followed by one of twice its size


class DownloadMemory:
    """The bytes that downloads may hold beyond the smallest block of each; used in the event loop's own thread."""

    def __init__(self, size: int) -> None:
        self.left = size

    @contextmanager
    def block(self, wanted: int) -> Iterator[int]:
        """The size of a block that may be held while the context is open: what is wanted, or what is left for it."""
        lent = min(max(0, wanted - SMALL), self.left)
        self.left -= lent
        try:
            yield min(wanted, SMALL + lent)
        finally:
            self.left += lent


def after(size: int, *, seconds: float) -> int:
    """The size to ask for after a block of `size` bytes that was taken in so many seconds."""
    return min(2 * size, LARGE) if seconds < QUICK_SECONDS else SMALL
