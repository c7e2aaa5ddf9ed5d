"""Objects that a process makes once, on first use: settings, engines, storage, counters.

Not `functools.cache`, because two threads that call it first at the same time would make two objects, each with limits
and connections of its own.
"""

from collections.abc import Callable
from threading import RLock
from typing import Generic, TypeVar, cast

Made = TypeVar("Made")

_NOTHING = object()


class Singleton(Generic[Made]):
    """Calls `make` on the first call; other threads wait for the result meanwhile. An error is not kept."""

    def __init__(self, make: Callable[[], Made]) -> None:
        self._make = make
        self._lock = RLock()
        self._made: object = _NOTHING
        self.__doc__ = make.__doc__

    def __call__(self) -> Made:
        """The one object."""
        if self._made is _NOTHING:
            with self._lock:
                if self._made is _NOTHING:
                    self._made = self._make()
        return cast(Made, self._made)

    @property
    def is_made(self) -> bool:
        """Whether the object was made and not forgotten."""
        return self._made is not _NOTHING

    def cache_clear(self) -> None:
        """Forget the object. The lock is new, too, because a fork may have copied it while another thread held it."""
        self._made, self._lock = _NOTHING, RLock()


def singleton(make: Callable[[], Made]) -> Singleton[Made]:
    """The decorator."""
    return Singleton(make)
