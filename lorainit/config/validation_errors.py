"""Turns pydantic's errors into sentences, each under the field's path as the caller wrote it. Loads no torch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

Details = Mapping[str, Any]  # one element of `ValidationError.errors()`
Part = str | int


def describe_errors(error: ValidationError, document: Any) -> dict[str, str]:
    """One sentence for each wrong field of `document`, by its dotted path.

    The alternatives of a union give an error each, and these are joined into one sentence.
    """
    found: dict[str, dict[str, None]] = {}
    for fault in error.errors():
        parts = list(drop_union_parts(fault["loc"], document, missing=fault["type"] == "missing"))
        if "param" in fault.get("ctx", {}):
            parts.append(fault["ctx"]["param"])
        sentence = fault["msg"].removeprefix("Value error, ")
        found.setdefault(".".join(map(str, parts)), {})[sentence] = None
    # A union of a list and a string reports the list and its element: only the inner error is useful.
    outer = {path for path in found if any(other.startswith(f"{path}.") for other in found)}
    return {path: _join_sentences(list(sentences)) for path, sentences in found.items() if path not in outer}


def drop_union_parts(location: Sequence[Part], document: Any, *, missing: bool) -> Iterator[Part]:
    """The parts of pydantic's location that are keys or indices of `document`.

    pydantic also puts the chosen alternative of a union into the location, which the caller did not write:
    `lora.init.pissa.niter` becomes `lora.init.niter`. A missing field is kept as the last part.
    """
    here, last = document, len(location) - 1
    for index, part in enumerate(location):
        if isinstance(here, list) and isinstance(part, int):
            here = here[part] if part < len(here) else None
        elif isinstance(here, Mapping) and part in here:
            here = here[part]
        elif not (missing and index == last):
            continue
        yield part


def _join_sentences(sentences: Sequence[str]) -> str:
    text = sentences[0] + "".join(f" or {other[:1].lower()}{other[1:]}" for other in sentences[1:])
    return text.replace(" or input should be ", " or ")
