"""Errors of libraries that trust the model files they read, as refusals of the model."""

from collections.abc import Iterator
from contextlib import contextmanager

from lorainit.config.errors import LorainitError, UnsupportedModel
from lorainit.runtime.machine_errors import is_machine_failure


@contextmanager
def as_unsupported(what: str) -> Iterator[None]:
    """Whatever is raised inside, by libraries that trust the files they read, is the files' fault.

    A panic of the tokenizers' Rust code is a BaseException that only its name tells apart. What the machine does
    wrong (no room, a failed device, a lost process) and what somebody asks for (`Stopped`, an interrupt) is passed on.
    """
    try:
        yield
    except LorainitError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if is_machine_failure(error):
            raise
        raise UnsupportedModel(f"{what}: {_words(error)}", param="model") from error


def _words(error: BaseException) -> str:
    """The beginning of an error's text, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
