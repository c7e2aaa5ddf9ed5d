"""The order of rows, which of them share a forward pass, and the two forms of a batch.

Packed: rows end to end without padding, and attention stays inside each row (`lorainit.model.forward.attention`).
Padded: rows side by side, filled up on the right. Initializations use padded batches, as does the training of a base
that our attention does not support. Both give the same losses.
"""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorainit.data.dataset import Dataset, Sample

# From the length of a row to a number: rows with the same number may share a pass. Some models need this, because they
# compute positions differently for long rows (`lorainit.model.forward.positions`). None = the row goes alone.
Regime = Callable[[int], int | None]


def any_length(_tokens: int) -> int | None:
    """The regime of most models: rows of all lengths may share a pass."""
    return 0


class Budget(NamedTuple):
    """The limit of a forward pass: its rows, and its tokens. Padding counts, unless rows are `packed`.

    A row with more tokens than the limit goes alone.
    """

    rows: int
    tokens: int = sys.maxsize
    packed: bool = False

    def tokens_of(self, rows: Sequence[Sample]) -> int:
        """How many tokens a pass over these rows has."""
        lengths = [len(row.ids) for row in rows]
        return sum(lengths) if self.packed else len(rows) * max(lengths)

    def half_of(self, largest: Sequence[Sample]) -> tuple[int, int]:
        """The tokens of the largest possible pass, and half of them: a new limit that does make this pass smaller.

        It is not half of the budget, because the budget may be larger than any pass and its half would change nothing.
        """
        tokens = min(self.tokens, self.tokens_of(largest))
        return tokens, max(1, tokens // 2)


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass.

    `ids`, `trained`: rows×length. A packed batch is one row of all tokens, in which no row's first token is trained.
    `predicting`: positions in the flattened rows×length whose next token is trained; `targets`: these next tokens.
    `layout`: further arguments of the model that describe the rows, such as the attention mask.
    """

    ids: Tensor
    trained: Tensor
    predicting: Tensor
    targets: Tensor
    layout: dict[str, Tensor | int]

    @property
    def attention(self) -> Tensor:
        """The attention mask of a padded batch, rows×length: 1 for tokens, 0 for padding."""
        mask = self.layout["attention_mask"]
        assert isinstance(mask, Tensor)
        return mask

    def cut(self, rows: int) -> list["Batch"]:
        """Split a padded batch into batches of `rows` rows each; the last may have fewer."""
        parts = zip(self.ids.split(rows), self.trained.split(rows), self.attention.split(rows), strict=True)
        return [_batch(ids, trained, {"attention_mask": mask}) for ids, trained, mask in parts]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device. All tensors are copied at once, because every copy waits for the GPU."""
        if device == self.ids.device:
            return self
        tensors = {name: value for name, value in {**vars(self), **self.layout}.items() if isinstance(value, Tensor)}
        there = copy_to_device(tensors, device)
        layout = {name: there.get(name, value) for name, value in self.layout.items()}
        return Batch(there["ids"], there["trained"], there["predicting"], there["targets"], layout)


def copy_to_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy these tensors to another device at once, as views of one tensor of bytes.

    Those with the largest elements come first, so that every view starts at a multiple of its element size.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    flat = [tensors[name].flatten().view(torch.uint8) for name in order]
    pieces = torch.cat(flat).to(device).split([len(piece) for piece in flat])
    return {n: p.view(tensors[n].dtype).view(tensors[n].shape) for n, p in zip(order, pieces, strict=True)}


def order_rows(data: Dataset, *, seed: int, epoch: int) -> list[int]:
    """A permutation of the samples that depends only on seed, epoch and the file's hash.

    The samples are sorted by keyed hashes and not shuffled, because a new version of a library's random generator might
    give another order.
    """
    key = f"{seed}\0{epoch}\0{data.sha256}\0".encode()
    return sorted(range(len(data.samples)), key=lambda i: hashlib.blake2b(key + str(i).encode()).digest())


def split_into_batches(samples: Sequence[Sample], budget: Budget, regime: Regime = any_length) -> list[list[Sample]]:
    """Micro-batches within the budget, each with rows of one regime.

    Rows are sorted by length, longest first, so that rows of similar length are together and need little padding.
    """
    pieces: list[list[Sample]] = []
    last: int | None = None
    tokens = 0  # of the last micro-batch
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
    """A batch of these rows on a device: packed or padded. `pad` is the token that fills up a padded one."""
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
    """Rows end to end. The layout has the names that transformers' models expect for packed rows."""
    lengths = [len(s.ids) for s in samples]
    ids = torch.cat([s.ids for s in samples]).long()
    trained = torch.cat([s.trained for s in samples])
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    trained[ends[:-1]] = False  # a row's first token has no prediction: the token before it belongs to another row
    layout: dict[str, Tensor | int] = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    return _batch(ids[None], trained[None], layout)


def _batch(ids: Tensor, trained: Tensor, layout: dict[str, Tensor | int]) -> Batch:
    """A batch with `predicting` and `targets`. They are made on the CPU, because `nonzero` would wait for a GPU."""
    predicting = torch.zeros_like(trained)
    predicting[:, :-1] = trained[:, 1:]
    return Batch(ids, trained, predicting.flatten().nonzero()[:, 0], ids[:, 1:][trained[:, 1:]], layout)


def pad_id(tokenizer: Any) -> int:
    """The token for padding. Any token will do, because padding is masked in attention and loss."""
    return int(next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0))
