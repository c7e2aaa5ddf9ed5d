"""Runs a call that may never return in a thread of its own, and checks meanwhile whether to go on waiting for it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from contextvars import copy_context
from typing import TypeVar

Result = TypeVar("Result")


def run_abandonable(call: Callable[[], Result], *, name: str, every: float, check: Callable[[], None]) -> Result:
    """What `call` returns or raises. `check` is called every so many seconds until then.

    Where it raises, that is raised, and the call is left alone in its thread (called `name`), which nobody waits for.
    """
    done, context = Future[Result](), copy_context()

    def work() -> None:
        try:
            done.set_result(context.run(call))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    while True:
        with suppress(TimeoutError):
            return done.result(every)
        if done.done():  # it ended just now, or with a TimeoutError of its own
            return done.result()
        check()
