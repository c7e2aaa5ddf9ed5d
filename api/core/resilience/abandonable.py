"""Runs a call that may never return in a thread of its own, so that the caller can stop waiting for it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from contextvars import copy_context
from typing import TypeVar

Result = TypeVar("Result")


def run_abandonable(call: Callable[[], Result], *, name: str, every: float, check: Callable[[], None]) -> Result:
    """Return or raise what `call` does. Until then, `check` is called every `every` seconds.

    If `check` raises, this function raises the same. The call goes on in its thread (named `name`) and is ignored.
    """
    done, context = Future[Result](), copy_context()  # the context, so that log lines in the thread have its ids

    def work() -> None:
        try:
            done.set_result(context.run(call))
        except BaseException as error:  # any, because otherwise the caller would wait for ever
            done.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    while True:
        with suppress(TimeoutError):
            return done.result(every)
        if done.done():  # it has just ended, or it raised a TimeoutError itself
            return done.result()
        check()
