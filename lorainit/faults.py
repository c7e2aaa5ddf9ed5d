"""What pydantic found wrong, by the fields that the person wrote. Torch-free."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

# How pydantic names the alternatives of a union in a location, such as `constrained-int`, `literal['auto']` or
# `function-after[check(), str]`: a name of ours has neither a dash nor a bracket.
_ALTERNATIVE = re.compile(r".*[-\[].*|int|float|str|bool|none|any")


def faults_of(error: ValidationError) -> dict[str, str]:
    """Each wrong field by its dotted path, with one sentence: what the alternatives of a union ask is joined."""
    found: dict[str, dict[str, None]] = {}
    for fault in error.errors():
        found.setdefault(_path(fault["loc"], fault.get("ctx", {})), {})[fault["msg"].removeprefix("Value error, ")] = (
            None
        )
    outer = {path for path in found if any(other.startswith(f"{path}.") for other in found)}  # no list, and its element
    return {path: _joined(list(sentences)) for path, sentences in found.items() if path not in outer}


def _path(location: Sequence[str | int], context: Mapping[str, Any]) -> str:
    return ".".join(_parts(location, context))


def _parts(location: Sequence[str | int], context: Mapping[str, Any]) -> Iterator[str]:
    for index, part in enumerate(location):
        if not index or isinstance(part, int) or _ALTERNATIVE.fullmatch(part) is None:
            yield str(part)
    if "param" in context:
        yield str(context["param"])


def _joined(sentences: Sequence[str]) -> str:
    text = sentences[0] + "".join(f" or {other[:1].lower()}{other[1:]}" for other in sentences[1:])
    return text.replace(" or input should be ", " or ")
