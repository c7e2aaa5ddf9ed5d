"""Errors of libraries that trust the model files they read, as refusals of the model."""

from collections.abc import Iterator
from contextlib import contextmanager

from lorainit.config.errors import LorainitError, UnsupportedModel
from lorainit.runtime.machine_errors import is_machine_failure


@contextmanager
def as_unsupported(what: str) -> Iterator[None]:
    """Raise `UnsupportedModel` for any error inside, because libraries fail in many ways on files that are wrong.

    A panic of the tokenizers' Rust code is a BaseException that can be recognized by its name only. Failures of the
    machine (no memory, a failed device, a lost process) and requests to stop (`Stopped`, an interrupt) are passed on.
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
