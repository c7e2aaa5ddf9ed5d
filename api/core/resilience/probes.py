"""Whether something that we depend on works, asked by many at once: few looks at it, and one bad look is no "no".

A good answer holds for a few seconds. After a bad one we look again in a second, and say "no" only once it has been bad
for a while, or if nothing ever was good: an orchestrator that is told "no" takes the whole service out.
"""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from api.core.logs import get_logger

GOOD_SECONDS = 5.0  # that a good answer holds
AGAIN_SECONDS = 1.0  # until a bad one is looked at again
PATIENCE_SECONDS = 3.0  # without a good answer, until it is "no"
BOUND_SECONDS = 2.0  # that anybody waits for a look, which a thread of its own takes


Found = TypeVar("Found")


class Probe(Generic[Found]):
    """What this process saw. `look` raises if the thing does not work; `found` is what it returned last."""

    def __init__(
        self,
        name: str,
        look: Callable[[], Found],
        *,
        good_seconds: float = GOOD_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.found: Found | None = None
        self._name, self._look, self._good_seconds, self._clock = name, look, good_seconds, clock
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._looked: float | None = None
        self._began: float | None = None  # the look that is being taken now
        self._bad_since: float | None = None
        self._was_good = False

    def works(self) -> bool:
        """The answer of now; begins a look if the last one is old and nobody looks.

        Who began it waits for its end, as everybody does for the first look of all, but no longer than the bound.
        """
        if self._begin_if_due() or self._looked is None:
            self._ended.wait(BOUND_SECONDS)
        return self._verdict()

    def _begin_if_due(self) -> bool:
        with self._lock:
            if self._began is not None or not self._is_due():
                return False
            began = self._began = self._clock()
            self._ended.clear()
        threading.Thread(target=self._take_a_look, args=(began,), name=f"look at {self._name}", daemon=True).start()
        return True

    def _is_due(self) -> bool:
        pause = self._good_seconds if self._bad_since is None else AGAIN_SECONDS
        return self._looked is None or self._clock() - self._looked > pause

    def _take_a_look(self, began: float) -> None:
        try:
            self.found = self._look()
        except Exception as error:
            self._bad_since = began if self._bad_since is None else self._bad_since
            get_logger(__name__).warning(f"{self._name}_unavailable", error=str(error))
        else:
            self._was_good, self._bad_since = True, None
        with self._lock:
            self._looked, self._began = self._clock(), None
            self._ended.set()

    def _verdict(self) -> bool:
        """A look that does not come to an end is a bad one."""
        began = self._began
        bad_since = began if self._bad_since is None else self._bad_since
        return self._was_good and (bad_since is None or self._clock() - bad_since < PATIENCE_SECONDS)
