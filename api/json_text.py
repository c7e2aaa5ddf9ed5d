"""Parses JSON that a caller sent, in a body or in a label: UTF-8, and no object may have a key twice.

The reason is that Python's parser silently keeps the last of two equal keys, which may not be the one that was meant.
"""

import json
from typing import Any

SHOWN = 80  # characters of a key


class Ambiguous(ValueError):
    """An object has a key twice. `key` is its beginning."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} occurs twice in one object")
        self.key = key


def parse(text: bytes | str, **hooks: Any) -> Any:
    """The value of a JSON text.

    Args:
        hooks: further arguments of `json.loads`.

    Raises:
        Ambiguous: an object in it has a key twice.
        UnicodeDecodeError: its bytes are not UTF-8.
        json.JSONDecodeError: it is not JSON.
        RecursionError: it is nested too deep.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")  # because `json.loads` would also accept UTF-16 and UTF-32
    return json.loads(text, object_pairs_hook=_object, **hooks)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen = set[str]()
    for key, _ in pairs:
        if key in seen:
            raise Ambiguous(key[:SHOWN])
        seen.add(key)
    raise AssertionError("fewer keys than pairs, but no key occurs twice")
