"""How much of a file is read at once: small blocks for clients that receive slowly, large ones for fast clients.

Each download may hold `SMALL` bytes. More is lent from memory that all downloads of a process share. So a client that
receives nothing costs little memory, and all downloads together have a limit.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from api.core.files.storage import BLOCK

SMALL = 256 * 1024  # little enough for a thousand downloads, and enough that requests to storage are few
LARGE = BLOCK
QUICK_SECONDS = 1.0  # a block that was sent within this time is followed by one of twice its size


class DownloadMemory:
    """Bytes that downloads may hold beyond `SMALL` each. Used only in the event loop's thread, so without a lock."""

    def __init__(self, size: int) -> None:
        self.left = size

    @contextmanager
    def block(self, wanted: int) -> Iterator[int]:
        """The size of a block that may be held while the context is open: `wanted`, or less if memory is short."""
        lent = min(max(0, wanted - SMALL), self.left)
        self.left -= lent
        try:
            yield min(wanted, SMALL + lent)
        finally:
            self.left += lent


def next_block_size(size: int, *, seconds: float) -> int:
    """The size of the next block after one of `size` bytes that was sent in so many seconds."""
    return min(2 * size, LARGE) if seconds < QUICK_SECONDS else SMALL
