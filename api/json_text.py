"""JSON that a caller sent, in a body or in a label: UTF-8, and no object has a key twice.

Of two equal keys Python's parser keeps the last without a word, which may not be the one that was meant.
"""

import json
from typing import Any

SHOWN = 80  # characters of a key


class Ambiguous(ValueError):
    """An object has a key twice; `key` is as much of it as can be shown."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} is there twice in one object")
        self.key = key


def parse(text: bytes | str, **hooks: Any) -> Any:
    """What a text stands for.

    Args:
        hooks: of `json.loads`.

    Raises:
        Ambiguous: an object in it has a key twice.
        UnicodeDecodeError: its bytes are no UTF-8.
        json.JSONDecodeError: it is no JSON.
        RecursionError: it is nested too deep.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")  # left to itself, Python would take UTF-16 and UTF-32 as well
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
    raise AssertionError("fewer keys than pairs, and none is there twice")
