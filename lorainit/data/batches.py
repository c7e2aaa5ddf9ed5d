"""The order in which rows are seen, which of them share a forward pass, and the two ways to lay them into one.

Packed: rows end to end, no padding, attention kept inside each row (`lorainit.model.forward.attention`). Padded:
rows side by side, filled up on the right; what initializations look at, and what a base without
our attention trains on. Both give the same losses. Knows nothing of adapters.
"""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorainit.data.dataset import Dataset, Sample

# What rows of a length must have in common to share a pass (`model.positions`); None = they go one by one.
Regime = Callable[[int], int | None]


def any_length(_tokens: int) -> int | None:
    """The regime of most models: rows of all lengths may share a pass."""
    return 0


class Budget(NamedTuple):
    """What a forward pass may hold: so many rows, and so many tokens, with the padding unless rows are `packed`.

    A row that is longer goes alone.
    """

    rows: int
    tokens: int = sys.maxsize
    packed: bool = False

    def tokens_of(self, rows: Sequence[Sample]) -> int:
        """What a pass over these rows takes of it."""
        lengths = [len(row.ids) for row in rows]
        return sum(lengths) if self.packed else len(rows) * max(lengths)

    def half_of(self, largest: Sequence[Sample]) -> tuple[int, int]:
        """Tokens of the largest pass that rows can make, and half of them.

        Where a budget is wider than what rows can make, half of the budget may change nothing.
        """
        tokens = min(self.tokens, self.tokens_of(largest))
        return tokens, max(1, tokens // 2)


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass.

    `ids`, `trained`: rows×length; packed, one row of all tokens, in which no row's first token is trained.
    `predicting`: where in the flattened rows×length a trained token is predicted; `targets`: that token.
    `layout`: what the model is told of the rows beside the ids.
    """

    ids: Tensor
    trained: Tensor
    predicting: Tensor
    targets: Tensor
    layout: dict[str, Tensor | int]

    @property
    def attention(self) -> Tensor:
        """Of a padded batch: which positions hold tokens, rows×length."""
        mask = self.layout["attention_mask"]
        assert isinstance(mask, Tensor)
        return mask

    def cut(self, rows: int) -> list["Batch"]:
        """A padded batch as several, of so many rows each; the last may have fewer."""
        parts = zip(self.ids.split(rows), self.trained.split(rows), self.attention.split(rows), strict=True)
        return [_batch(ids, trained, {"attention_mask": mask}) for ids, trained, mask in parts]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device, all of it in one copy: a GPU is waited for at each."""
        if device == self.ids.device:
            return self
        tensors = {name: value for name, value in {**vars(self), **self.layout}.items() if isinstance(value, Tensor)}
        there = copy_to_device(tensors, device)
        layout = {name: there.get(name, value) for name, value in self.layout.items()}
        return Batch(there["ids"], there["trained"], there["predicting"], there["targets"], layout)


def copy_to_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """These on another device as views of one piece; numbers of more bytes first, so that each lies where it may."""
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    flat = [tensors[name].flatten().view(torch.uint8) for name in order]
    pieces = torch.cat(flat).to(device).split([len(piece) for piece in flat])
    return {n: p.view(tensors[n].dtype).view(tensors[n].shape) for n, p in zip(order, pieces, strict=True)}


def order(data: Dataset, *, seed: int, epoch: int) -> list[int]:
    """A permutation of the samples that depends on seed, epoch and the file's hash, and on nothing else.

    Sorted by keyed hashes rather than drawn, so no library's generator is part of the promise.
    """
    key = f"{seed}\0{epoch}\0{data.sha256}\0".encode()
    return sorted(range(len(data.samples)), key=lambda i: hashlib.blake2b(key + str(i).encode()).digest())


def batches(samples: Sequence[Sample], budget: Budget, regime: Regime = any_length) -> list[list[Sample]]:
    """Micro-batches of rows of one regime within the budget, rows of similar length together to save padding."""
    pieces: list[list[Sample]] = []
    last: int | None = None
    tokens = 0  # of the last piece
    for sample in sorted(samples, key=lambda s: -len(s.ids)):
        kind, length = regime(len(sample.ids)), len(sample.ids)
        added = length if budget.packed or not pieces else len(pieces[-1][0].ids)
        fits = pieces and len(pieces[-1]) < budget.rows and tokens + added <= budget.tokens
        if fits and kind is not None and kind == last:
            pieces[-1].append(sample)
            tokens += added
        else:
            pieces.append([sample])
            tokens = length
        last = kind
    return pieces


def make_batch(samples: Sequence[Sample], *, packed: bool, pad: int, device: torch.device) -> Batch:
    """Rows to a batch on a device: end to end, or side by side."""
    return (pack(samples) if packed else collate(samples, pad=pad)).to(device)


def collate(samples: Sequence[Sample], *, pad: int) -> Batch:
    """Rows side by side, padded on the right to the longest."""
    length = max(len(s.ids) for s in samples)
    ids = torch.full((len(samples), length), pad, dtype=torch.long)
    attention = torch.zeros(len(samples), length, dtype=torch.long)
    trained = torch.zeros(len(samples), length, dtype=torch.bool)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = sample.ids
        attention[row, : len(sample.ids)] = 1
        trained[row, : len(sample.ids)] = sample.trained
    return _batch(ids, trained, {"attention_mask": attention})


def pack(samples: Sequence[Sample]) -> Batch:
    """Rows end to end; the layout is told in transformers' words for packed rows."""
    lengths = [len(s.ids) for s in samples]
    ids = torch.cat([s.ids for s in samples]).long()
    trained = torch.cat([s.trained for s in samples])
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    trained[ends[:-1]] = False  # the token before a row's first is another row's last
    layout: dict[str, Tensor | int] = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    return _batch(ids[None], trained[None], layout)


def _batch(ids: Tensor, trained: Tensor, layout: dict[str, Tensor | int]) -> Batch:
    """The shifted views are made here, on the CPU: finding positions on a GPU would wait for it."""
    predicting = torch.zeros_like(trained)
    predicting[:, :-1] = trained[:, 1:]
    return Batch(ids, trained, predicting.flatten().nonzero()[:, 0], ids[:, 1:][trained[:, 1:]], layout)


def pad_id(tokenizer: Any) -> int:
    """Any token will do: padding is masked in attention and loss."""
    return int(next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0))
