"""Full names of layers: which of them a shorter name covers, and how many names are written as one folded name.

A name covers every path that ends in it, cut at dots, with `*` for a number: `q_proj`, `layers.*.self_attn.q_proj`,
`layers.0.self_attn.q_proj`. A folded name stands for several paths: `model.layers.0-31.self_attn.q_proj` for 32.
Catalogue entries are folded because a large model has thousands of layers. Loads no torch.
"""

import math
import re
from collections.abc import Iterable, Iterator
from itertools import product

_NUMBERS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")  # `3`, `0-31`, `0,2,4-7`


def matches(path: str, wanted: str) -> bool:
    """Whether a full name, or one of those that a folded name stands for, equals `wanted` or ends in it."""
    return count_matches(path, wanted) > 0


def count_matches(path: str, wanted: str) -> int:
    """How many of the full names behind a folded `path` the name `wanted` covers."""
    parts, ends = path.split("."), wanted.split(".")
    if len(ends) > len(parts):
        return 0
    start = len(parts) - len(ends)
    return count_names(".".join(parts[:start])) * math.prod(map(_count_part_matches, parts[start:], ends))


def count_names(path: str) -> int:
    """How many full names a folded name stands for."""
    return math.prod(_count_part_matches(part, "*") or 1 for part in path.split("."))


def expand_names(path: str) -> Iterator[str]:
    """The full names that a folded name stands for."""
    parts = [_expand_numbers(part) if _NUMBERS.fullmatch(part) else [part] for part in path.split(".")]
    return map(".".join, product(*parts))


def _expand_numbers(part: str) -> list[str]:
    pieces = (piece.split("-") for piece in part.split(","))
    return [str(number) for piece in pieces for number in range(int(piece[0]), int(piece[-1]) + 1)]


def _count_part_matches(part: str, end: str) -> int:
    if not _NUMBERS.fullmatch(part):
        return int(part == end)
    ranges = [[int(number) for number in piece.split("-")] for piece in part.split(",")]
    if end == "*":
        return sum(piece[-1] - piece[0] + 1 for piece in ranges)
    return int(part == end or (end.isdecimal() and any(piece[0] <= int(end) <= piece[-1] for piece in ranges)))


def collapse_names(paths: Iterable[str]) -> list[str]:
    """Fold full names into as few names as possible, in order of first appearance."""
    kinds = dict[str, list[tuple[int, ...]]]()
    for path in paths:
        parts = path.split(".")
        words = ".".join("*" if part.isdigit() else part for part in parts)
        kinds.setdefault(words, []).append(tuple(int(part) for part in parts if part.isdigit()))
    return [_fill_numbers(words, numbers) for words, found in kinds.items() for numbers in _products(found)]


def _fill_numbers(words: str, numbers: Iterable[str]) -> str:
    left = iter(numbers)
    return ".".join(next(left) if part == "*" else part for part in words.split("."))


def _products(found: list[tuple[int, ...]]) -> Iterator[tuple[str, ...]]:
    """Write tuples of numbers as products of sets: first numbers with the same continuations become one set."""
    if not found[0]:
        yield ()
        return
    behind = dict[int, list[tuple[int, ...]]]()
    for first, *others in found:
        behind.setdefault(first, []).append(tuple(others))
    alike = dict[tuple[tuple[int, ...], ...], list[int]]()
    for first, rest in behind.items():
        alike.setdefault(tuple(rest), []).append(first)
    for same, firsts in alike.items():
        for more in _products(list(same)):
            yield _collapse_numbers(sorted(firsts)), *more


def _collapse_numbers(numbers: list[int]) -> str:
    pieces = list[list[int]]()
    for number in numbers:
        if pieces and pieces[-1][-1] == number - 1:
            pieces[-1][1:] = [number]
        else:
            pieces.append([number])
    return ",".join("-".join(map(str, piece)) for piece in pieces)
