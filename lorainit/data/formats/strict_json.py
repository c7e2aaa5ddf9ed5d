"""Parses JSON that somebody sent, with the same rules for a row of a file and for the arguments of a call in it.

Numbers have to be finite, text must not contain half of a surrogate pair, and values must not be nested too deeply for
the code that later walks through them and renders them. Does not import torch.

A fast parser reads first. It accepts nothing that Python's own parser refuses, but it reports less: it silently keeps
the last of two equal keys, turns an integer of more than 64 bits into a float, and has other error messages. If one of
these may matter, Python's parser reads the text again, and its result counts (docs/decisions/0042).
"""

import json
from typing import Any

import orjson

# Schemas of real tools have about 20 levels. The limit is needed because code that walks through a value makes a call
# for each level, templates several, and Python allows 1,000 nested calls.
MAX_DEPTH = 64
_CONTAINERS = (dict, list)
# Floats from this size on may have been integers of more than 64 bits in the text.
_LARGE = float(2**63)
# Longer texts are read by Python's parser, because the fast one crashes if memory runs out, and Python's raises an
# error. A value of this length takes about 40 MiB.
_LONG = 1 << 20


class Unreadable(ValueError):
    """The text cannot be used. `code` is `invalid_json` or `invalid_utf8`; the message says why."""

    def __init__(self, code: str, why: str) -> None:
        super().__init__(why)
        self.code = code


def read(text: bytes | str, doubled: list[str]) -> Any:
    """The value of a JSON text. The first key that an object in it has twice is added to `doubled`.

    Raises:
        Unreadable: it is not JSON, or breaks one of the rules of this module.
        UnicodeDecodeError: its bytes are not UTF-8.
    """
    if len(text) > _LONG:
        return _read_closely(text, doubled)
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return _read_closely(text, doubled)
    return value if _is_ordinary(value) and _says_all(value, text) else _read_closely(text, doubled)


def _is_ordinary(value: Any) -> bool:
    """Whether the value is not nested too deeply and has no number that may have been a large integer."""
    level: list[Any] = [[value]]
    depth = -1  # of the list around it
    while level and depth < MAX_DEPTH:
        inner = []
        for outer in level:
            for part in outer.values() if type(outer) is dict else outer:
                kind = type(part)
                if kind is dict or kind is list:
                    inner.append(part)
                elif kind is float and not -_LARGE < part < _LARGE:
                    return False
        level = inner
        depth += 1
    return not level


def _says_all(value: Any, text: bytes | str) -> bool:
    """Whether no key was written twice in one object.

    The value is written again, and has to have as many quotation marks as the text. A key that the parser has dropped
    would make at least two fewer. A text with `\\u0022` is not accepted here, because this escaped quotation mark would
    count in the written value and not in the text.
    """
    if isinstance(text, str):
        text = text.encode()
    return orjson.dumps(value).count(b'"') == text.count(b'"') and rb"\u0022" not in text


def _read_closely(text: bytes | str, doubled: list[str]) -> Any:
    """As `read`, with Python's own parser. It is slower, but finds equal keys and has precise messages."""

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and not doubled:
            seen = set[str]()
            doubled.append(next(name for name, _ in pairs if name in seen or seen.add(name)))  # type: ignore[func-returns-value]
        return found

    text = text.decode() if isinstance(text, bytes) else text
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=as_dict)
    except json.JSONDecodeError as error:
        raise Unreadable("invalid_json", f"not JSON: {error.msg} at column {error.colno}.") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise Unreadable("invalid_json", f"not JSON that can be read: {str(error)[:120]}.") from None
    if _is_too_deep(value):
        raise _too_deep()
    if "\\u" in text:
        _refuse_half_pairs(value)
    return value


def _too_deep() -> Unreadable:
    return Unreadable("invalid_json", f"its values are nested more than {MAX_DEPTH} deep.")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is larger than any number that can be read")
    return value


def _is_too_deep(value: Any) -> bool:
    """Level by level and not recursively, because a deep value would exceed Python's limit of nested calls."""
    level = [value] if isinstance(value, _CONTAINERS) else []
    depth = 0
    while level and depth < MAX_DEPTH:
        insides = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [inner for inside in insides for inner in inside if isinstance(inner, _CONTAINERS)]
        depth += 1
    return bool(level)


def _refuse_half_pairs(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise Unreadable("invalid_utf8", "an escape stands for half a surrogate pair.") from None
