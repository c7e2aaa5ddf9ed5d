"""The largest forward pass that rows can make, in whichever order they are drawn: what is tried before step 1.

A step draws a few rows, so the largest pass of a run is known only when all are drawn. What is made here is at least
as large as any of them, and at most as large as a budget, or the longest row, allows. "Large" is by whatever memory
grows with: tokens, what attention makes of the length of rows (at most the square), and trained tokens.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import nlargest
from math import isqrt
from typing import NamedTuple

import torch

from lorainit.data.batches import Budget
from lorainit.data.dataset import Sample


class Size(NamedTuple):
    """How large a pass is: its tokens with the padding, the squares of its rows' lengths, its trained tokens."""

    tokens: int
    squares: int
    trained: int

    def covers(self, other: "Size") -> bool:
        """Whether no part of the other is larger."""
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))


def size_of(rows: Sequence[Sample], *, packed: bool) -> Size:
    """How large a pass over these rows is."""
    lengths = [len(row.ids) for row in rows]
    lengths = lengths if packed else [max(lengths)] * len(lengths)
    return Size(sum(lengths), sum(n * n for n in lengths), sum(_trained(row) for row in rows))


@dataclass(frozen=True)
class Rows:
    """Rows of which passes are made, at most `most` to a pass."""

    samples: Sequence[Sample]
    most: int

    def largest_pass(self, budget: Budget) -> list[Sample]:
        """Rows, or parts of them, that no pass within a budget is larger than."""
        rows = self._packed(budget.tokens) if budget.packed else self._padded(budget.tokens)
        return _with_trained(rows, self._trained(budget.tokens))

    def takes_one_pass(self, budget: Budget) -> bool:
        """Whether any `most` of the rows fit into one pass."""
        lengths = [len(row.ids) for row in self._longest]
        return (sum(lengths) if budget.packed else self.most * lengths[0]) <= budget.tokens

    @cached_property
    def _longest(self) -> list[Sample]:
        return nlargest(self.most, self.samples, key=lambda row: len(row.ids))

    def _trained(self, tokens: int) -> int:
        """Trained tokens of a pass, at most: of one row, or of several within the budget."""
        counts = nlargest(self.most, map(_trained, self.samples))
        return max(counts[0], min(tokens, sum(counts)))

    @cached_property
    def _lengths(self) -> list[tuple[int, int]]:
        """(length, number of rows that are no longer) of every length there is."""
        found, rows = [], 0
        for length, count in sorted(Counter(len(row.ids) for row in self.samples).items()):
            rows += count
            found.append((length, rows))
        return found

    def _packed(self, tokens: int) -> list[Sample]:
        """The longest rows, the last one cut: the first n of them have as many tokens as the first n of any pass."""
        left, rows = max(tokens, len(self._longest[0].ids)), list[Sample]()
        for row in self._longest:
            rows.append(_cut(row, left))
            left -= len(rows[-1].ids)
            if not left:
                break
        return rows

    def _padded(self, tokens: int) -> list[Sample]:
        """Equal rows, no longer than the longest: the fewest tokens that are as many, with squares as large."""
        passes = [(min(self.most, rows, max(1, tokens // length)), length) for length, rows in self._lengths]
        area, squares = max(n * length for n, length in passes), max(n * length**2 for n, length in passes)
        trained = max(n * (length - 1) for n, length in passes)
        shapes = (
            (n, max(-(-area // n), _root(-(-squares // n)), 1 + -(-trained // n))) for n in range(1, self.most + 1)
        )
        row = self._longest[0]
        count, length = min(((n, size) for n, size in shapes if size <= len(row.ids)), key=lambda s: s[0] * s[1])
        return [_cut(row, length)] * count


def _trained(row: Sample) -> int:
    return int(row.trained[1:].sum())


def _root(number: int) -> int:
    """The square root, rounded up."""
    return isqrt(number - 1) + 1


def _cut(row: Sample, tokens: int) -> Sample:
    return row if len(row.ids) <= tokens else Sample(row.line, row.ids[:tokens], row.trained[:tokens])


def _with_trained(rows: Sequence[Sample], tokens: int) -> list[Sample]:
    """The rows with so many trained tokens, if they have as many; the first of a row never counts."""
    found = []
    for row in rows:
        trained = torch.zeros(len(row.ids), dtype=torch.bool)
        trained[1 : 1 + max(0, tokens)] = True
        tokens -= max(0, len(row.ids) - 1)
        found.append(Sample(row.line, row.ids, trained))
    return found
