"""Threads for calls that may wait: storage, the broker, health and searches have their own, so that none blocks others.

The framework runs plain functions in forty threads. Otherwise forty downloads from a slow store would block everything
else in the process.
"""

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

STORAGE_THREADS, HEALTH_THREADS, BROKER_THREADS, SEARCH_THREADS = 40, 8, 8, 2
_storage = RunVar[CapacityLimiter]("storage threads")
_health = RunVar[CapacityLimiter]("health threads")
_broker = RunVar[CapacityLimiter]("broker threads")
_search = RunVar[CapacityLimiter]("search threads")


async def run_in_storage_thread(
    work: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
) -> Result:
    """Run a function that reads or writes storage."""
    limiter = _limiter(_storage, STORAGE_THREADS)
    return await to_thread.run_sync(partial(work, *arguments, **named), limiter=limiter)


async def run_in_health_thread(work: Callable[[], Result]) -> Result:
    """Run a health check."""
    return await to_thread.run_sync(work, limiter=_limiter(_health, HEALTH_THREADS))


async def run_in_broker_thread(work: Callable[[str], None], job_id: str) -> None:
    """Run a function that waits for the broker."""
    await to_thread.run_sync(work, job_id, limiter=_limiter(_broker, BROKER_THREADS))


async def run_in_search_thread(work: Callable[[], Result]) -> Result:
    """Run a query that may read many rows: two at a time, so that connections and a processor are left for polls."""
    return await to_thread.run_sync(work, limiter=_limiter(_search, SEARCH_THREADS))


def _limiter(kept: RunVar[CapacityLimiter], threads: int) -> CapacityLimiter:
    """The limiter of the running event loop."""
    try:
        return kept.get()
    except LookupError:
        limiter = CapacityLimiter(threads)
        kept.set(limiter)
        return limiter
