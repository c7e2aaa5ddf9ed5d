"""Makes a forward pass that is at least as large as any pass of a run. It is tried before step 1.

Each step takes a few rows in random order, so the true largest pass would be known only after all steps. The pass that
is made here is at least as large as each of them, and no larger than the budget or the longest row allows. "Large"
means everything that memory grows with: tokens, the squares of row lengths (because of attention), and trained tokens.
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
    """The size of a pass: its tokens with padding, the sum of the squares of its rows' lengths, its trained tokens."""

    tokens: int
    squares: int
    trained: int

    def covers(self, other: "Size") -> bool:
        """Whether `other` is no larger in any of the three numbers."""
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))


def size_of(rows: Sequence[Sample], *, packed: bool) -> Size:
    """The size of a pass over these rows."""
    lengths = [len(row.ids) for row in rows]
    lengths = lengths if packed else [max(lengths)] * len(lengths)
    return Size(sum(lengths), sum(n * n for n in lengths), sum(_trained(row) for row in rows))


@dataclass(frozen=True)
class Rows:
    """The rows that passes are made of, at most `most` rows to a pass."""

    samples: Sequence[Sample]
    most: int

    def largest_pass(self, budget: Budget) -> list[Sample]:
        """Rows, or parts of rows, whose pass is at least as large as any pass within the budget."""
        rows = self._packed(budget.tokens) if budget.packed else self._padded(budget.tokens)
        return _with_trained(rows, self._trained(budget.tokens))

    def takes_one_pass(self, budget: Budget) -> bool:
        """Whether any `most` of the rows fit into one pass, so that every step takes one."""
        lengths = [len(row.ids) for row in self._longest]
        return (sum(lengths) if budget.packed else self.most * lengths[0]) <= budget.tokens

    @cached_property
    def _longest(self) -> list[Sample]:
        return nlargest(self.most, self.samples, key=lambda row: len(row.ids))

    def _trained(self, tokens: int) -> int:
        """The most trained tokens of a pass: those of one row, or of several rows within the budget."""
        counts = nlargest(self.most, map(_trained, self.samples))
        return max(counts[0], min(tokens, sum(counts)))

    @cached_property
    def _lengths(self) -> list[tuple[int, int]]:
        """(length, number of rows of at most this length) for every length that occurs, in ascending order."""
        found, rows = [], 0
        for length, count in sorted(Counter(len(row.ids) for row in self.samples).items()):
            rows += count
            found.append((length, rows))
        return found

    def _packed(self, tokens: int) -> list[Sample]:
        """The longest rows, with the last one cut at the limit.

        For every n, the first n of them have at least as many tokens as the n longest rows of any pass. So every sum
        that grows with the lengths, such as that of their squares, is largest here.
        """
        left, rows = max(tokens, len(self._longest[0].ids)), list[Sample]()
        for row in self._longest:
            rows.append(_cut(row, left))
            left -= len(rows[-1].ids)
            if not left:
                break
        return rows

    def _padded(self, tokens: int) -> list[Sample]:
        """Equal rows, no longer than the longest row.

        Of all such rectangles it has the fewest tokens among those that are at least as large as any pass: in tokens,
        in squares of lengths and in tokens that can be trained.
        """
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
    """The same rows, with the first `tokens` of their tokens trained. A row's first token is never trained."""
    found = []
    for row in rows:
        trained = torch.zeros(len(row.ids), dtype=torch.bool)
        trained[1 : 1 + max(0, tokens)] = True
        tokens -= max(0, len(row.ids) - 1)
        found.append(Sample(row.line, row.ids, trained))
    return found
