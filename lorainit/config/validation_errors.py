"""Turns pydantic's errors into sentences, each under the path of the field as the caller wrote it. Torch-free."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

Details = Mapping[str, Any]  # one element of `ValidationError.errors()`
Part = str | int


def describe_errors(error: ValidationError, document: Any) -> dict[str, str]:
    """Each wrong field of `document` by its dotted path, with one sentence: what the alternatives of a union ask is
    joined."""
    found: dict[str, dict[str, None]] = {}
    for fault in error.errors():
        parts = list(drop_union_parts(fault["loc"], document, missing=fault["type"] == "missing"))
        if "param" in fault.get("ctx", {}):
            parts.append(fault["ctx"]["param"])
        sentence = fault["msg"].removeprefix("Value error, ")
        found.setdefault(".".join(map(str, parts)), {})[sentence] = None
    outer = {path for path in found if any(other.startswith(f"{path}.") for other in found)}  # no list, and its element
    return {path: _join_sentences(list(sentences)) for path, sentences in found.items() if path not in outer}


def drop_union_parts(location: Sequence[Part], document: Any, *, missing: bool) -> Iterator[Part]:
    """Those parts of pydantic's location that lead through `document`.

    Beside them it names the alternatives of unions, which nobody wrote: `lora.init.pissa.niter` is `lora.init.niter`.
    A field that is missing ends its own path.
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
