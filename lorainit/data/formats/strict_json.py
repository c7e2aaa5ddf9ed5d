"""JSON that somebody sent, by the one rule that holds for a row of a file and for the arguments of a call in it.

Numbers are finite, text has no half of a surrogate pair, and values are nested no deeper than what searches and renders
them later can follow. Torch-free; knows nothing of rows.

A fast parser reads first. It takes nothing that Python's own does not take, but says less: it keeps the last of two
equal keys without a word, makes a float of an integer of more than 64 bits, and has other words for what is wrong.
Where that may matter, Python's own parser reads the text again and has the last word (docs/decisions/0042).
"""

import json
from typing import Any

import orjson

# Schemas of real tools have some 20 levels. Whatever walks through a value calls itself for each, templates several
# times, and Python ends at 1,000 calls.
MAX_DEPTH = 64
_CONTAINERS = (dict, list)
# Floats of this size may have been integers of more than 64 bits.
_LARGE = float(2**63)
# Where memory runs out, the fast parser crashes, and Python's own says so. Values of this length take some 40 MiB.
_LONG = 1 << 20


class Unreadable(ValueError):
    """Why a text is not to be used, with a code: `invalid_json` or `invalid_utf8`."""

    def __init__(self, code: str, why: str) -> None:
        super().__init__(why)
        self.code = code


def read(text: bytes | str, doubled: list[str]) -> Any:
    """The value that a text stands for; the first key that an object in it has twice goes to `doubled`.

    Raises:
        Unreadable: it stands for none.
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
    """Whether it is nested no deeper than allowed, without a number that may have been a large integer."""
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
    """Whether no key was written twice: a value written again has as many quotation marks as its text had.

    A second key takes two more with it. One that is escaped by its number is none in the text, and one in the value.
    """
    if isinstance(text, str):
        text = text.encode()
    return orjson.dumps(value).count(b'"') == text.count(b'"') and rb"\u0022" not in text


def _read_closely(text: bytes | str, doubled: list[str]) -> Any:
    """What `read` promises, by Python's own parser."""

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
    """Level by level, so that nothing here calls itself."""
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
