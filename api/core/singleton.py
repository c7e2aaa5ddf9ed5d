"""What a process makes once, on first use: settings, engines, storage, counters.

`functools.cache` would let two threads that come first at the same time make two, each with limits and connections of
its own.
"""

from collections.abc import Callable
from threading import RLock
from typing import Generic, TypeVar, cast

Made = TypeVar("Made")

_NOTHING = object()


class Singleton(Generic[Made]):
    """Calls `make` when it is called first; threads that come meanwhile wait for what is made. An error is not kept."""

    def __init__(self, make: Callable[[], Made]) -> None:
        self._make = make
        self._lock = RLock()
        self._made: object = _NOTHING
        self.__doc__ = make.__doc__

    def __call__(self) -> Made:
        """What was made."""
        if self._made is _NOTHING:
            with self._lock:
                if self._made is _NOTHING:
                    self._made = self._make()
        return cast(Made, self._made)

    @property
    def is_made(self) -> bool:
        """Something was made and not forgotten."""
        return self._made is not _NOTHING

    def cache_clear(self) -> None:
        """Forget what was made; also after a fork, which may have copied the lock while another thread held it."""
        self._made, self._lock = _NOTHING, RLock()


def singleton(make: Callable[[], Made]) -> Singleton[Made]:
    """The decorator."""
    return Singleton(make)
