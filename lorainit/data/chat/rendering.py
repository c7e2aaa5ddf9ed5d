"""Renders a chat template with limits on time, memory and output, because it is a program that came with the model.

Jinja's sandbox protects files and Python's internals, but a template could still loop for ever or make a text of
gigabytes. Three limits together prevent that (docs/decisions/0029): another thread raises an exception in ours, which
ends any loop in a template or a filter; the memory that this process may write to is limited; and `**` is refused,
because a single power may take hours, and no exception arrives inside of one operation.
"""

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorainit.config.errors import UnsupportedModel

MAX_SECONDS = 10.0  # the slowest real templates take some 0.05 s for conversations of a hundred messages
MAX_CHARACTERS = 32 << 20  # a row of a file is at most 1 MB, and tools may be described in it more than once
MAX_BYTES = 1 << 30  # beyond what the process holds
MAX_TEMPLATE = 1 << 20  # the longest template on the hub has some 30 KB
_LOOK_SECONDS = 0.2  # between two looks at the time
_IDLE_SECONDS = 5.0  # the watching thread ends after this time without a rendering
_STATUS = Path("/proc/self/status")
_OPERANDS = {"name", "integer", "float", "string"}


class RenderLimitExceeded(UnsupportedModel):
    """The template exceeds a limit of time, memory or output, or has an operation that cannot be limited."""


class _TooSlow(BaseException):  # not an Exception, so that no `except Exception` in a filter catches it
    """Raised by the watching thread in the thread that renders."""


def render(action: Callable[[], str]) -> str:
    """Return what `action` renders.

    Raises:
        RenderLimitExceeded: it takes too long, takes too much memory, or renders too much.
    """
    try:
        with _limited():
            text = _watch.run(action)
    except _TooSlow as error:
        raise _limit_exceeded(f"takes more than {MAX_SECONDS:.0f} s for one conversation") from error
    except MemoryError as error:
        raise _limit_exceeded(f"takes more than {MAX_BYTES >> 20} MiB for one conversation") from error
    if len(text) > MAX_CHARACTERS:
        raise _limit_exceeded(f"makes a text of {len(text)} characters of one conversation")
    return text


def check_source(source: str) -> None:
    """Refuse a template with operations that cannot be interrupted.

    Raises:
        RenderLimitExceeded: the template takes powers or rounds to any number of digits, or is too long to be checked.
    """
    if len(source) > MAX_TEMPLATE:
        raise _limit_exceeded(f"has {len(source)} characters")
    try:
        # The lexer is enough and does not run anything. It is that of the environment in which transformers renders.
        tokens = [(kind, text) for _, kind, text in ImmutableSandboxedEnvironment().lex(source) if kind != "whitespace"]
    except TemplateError:
        return  # rendering it will fail with a message that says what is wrong
    for (before, left), (_, text) in pairwise(tokens):
        if text == "**" and (before in _OPERANDS or left in (")", "]", "}")):
            raise _limit_exceeded("takes powers (**), and numbers have no bound")
        if left == "|" and text == "round":
            raise _limit_exceeded("rounds numbers, to any number of digits")


def _limit_exceeded(what: str) -> RenderLimitExceeded:
    return RenderLimitExceeded(f"The base model's chat template {what}.", param="model")


# --- time ----------------------------------------------------------------------------------------


class _Watch:
    """A thread that ends a rendering that takes too long. It is started when needed, and ends when it has been idle."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.turn = threading.Lock()  # one rendering at a time
        self.running: tuple[int, float] | None = None
        self.fired = False
        self.last = 0.0
        self.thread: threading.Thread | None = None

    def run(self, action: Callable[[], str]) -> str:
        """Run `action`; raises `_TooSlow` when its time is over."""
        with self.turn:
            return self._run(action)

    def _run(self, action: Callable[[], str]) -> str:
        arrived = False
        self._start()
        try:
            return action()
        except _TooSlow:
            arrived = True
            raise
        finally:
            with self.lock:
                self.running, self.last = None, time.monotonic()
            while self.fired and not arrived:
                # The exception was sent and arrives at some next instruction. It is awaited here, because otherwise it
                # would interrupt other work.
                time.sleep(0.001)

    def _start(self) -> None:
        with self.lock:
            self.fired, self.last = False, time.monotonic()
            self.running = threading.get_ident(), self.last
            if self.thread is None:
                self.thread = threading.Thread(target=self._look, name="template", daemon=True)
                self.thread.start()

    def _look(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            with self.lock:
                now = time.monotonic()
                if self.running is None and now - self.last > _IDLE_SECONDS:
                    self.thread = None
                    return
                if self.running is not None and not self.fired and now - self.running[1] > MAX_SECONDS:
                    self.fired = True
                    who = ctypes.c_ulong(self.running[0])
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(who, ctypes.py_object(_TooSlow))


_watch = _Watch()


# --- memory --------------------------------------------------------------------------------------


@contextmanager
def _limited() -> Iterator[None]:
    """Limit the writable memory of this process to what it has now plus `MAX_BYTES`, on systems that support it."""
    held = _held.bytes()
    if held is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = held + MAX_BYTES
    if soft == resource.RLIM_INFINITY or most < soft:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


class _Held:
    """How much writable memory this process has. It is read once a second, since reading it takes as long as a row."""

    def __init__(self) -> None:
        self.at = -1.0
        self.found: int | None = None

    def bytes(self) -> int | None:
        """In bytes; None where the system does not say."""
        now = time.monotonic()
        if self.at < 0 or now - self.at > 1.0:
            self.at, self.found = now, _data_bytes()
        return self.found


def _data_bytes() -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), None)


_held = _Held()
