"""Text and answers to token ids and a mask, as a server and a model would have made them.

A server tokenizes the prompt alone and the model goes on from there, so no token may lie across the border between
the two: a text is cut where an answer begins, and each piece is tokenized by itself.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorainit.config.errors import UnsupportedModel
from lorainit.data.chat import tokenizer_time
from lorainit.data.chat.turns import Span

# Ids, and the characters that each of them stands for.
Tokens = tuple[list[int], list[tuple[int, int]]]
# Texts to go on from, of kinds that no tokenizer merges with everything.
_ANCHORS = ("\n", "a", ".", "0")


class Encoded(NamedTuple):
    """Token ids, a mask of the same length with what is trained, and behind which token each answer ends."""

    ids: Tensor
    trained: Tensor
    ends: list[int]


class Encoder:
    """Text and trained spans to token ids and a mask."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        bare = tokenizer("a", add_special_tokens=False).input_ids
        full = tokenizer("a").input_ids
        # What the tokenizer puts before a text of its own accord (a begin-of-text token, or nothing).
        self.opening: list[int] = full[: full.index(bare[0])] if bare and bare[0] in full else []
        # Whether a text at its beginning is tokenized otherwise than behind another one, with a space before it.
        self._ahead: dict[str, Tokens] = {}
        self._begins_anew = self._encode("\na")[0] != self._encode("\n")[0] + self._encode("a")[0]

    def ahead(self, texts: Iterable[Sequence[str]]) -> None:
        """Read the pieces of several texts at once, in half the time: those that `text` and `pair` are given next.

        Args:
            texts: of each the pieces that are read by themselves, as `pieces` has them.
        """
        wanted = dict[str, None]()
        for first, *more in texts:
            wanted[first] = None
            behind = bool(first)
            for piece in more:
                wanted[_ANCHORS[0] + piece if self._begins_anew and behind else piece] = None
                behind = True
        wanted.pop("", None)
        self._ahead = {}
        if not wanted:
            return
        with suppress(UnsupportedModel):  # whichever cannot be read is told by its own row
            found = tokenizer_time.read(self.tokenizer, list(wanted), add_special_tokens=False)
            self._ahead = dict(zip(wanted, zip(found.input_ids, found.offset_mapping, strict=True), strict=True))

    def text(self, text: str, spans: Sequence[Span]) -> Encoded:
        """Tokens of a rendered conversation; trained are those of the spans."""
        ids, ends = self._encode(text[: spans[0].start])[0], list[int]()
        mask = [False] * len(ids)
        for piece, answer in _pieces(text, spans):
            more, starts = self._continued(piece, behind=len(ids) > 0)
            # A token may say that it begins later than it does (trim_offsets), never that it begins earlier.
            trained = next((n for n, start in enumerate(starts) if start >= answer), len(more))
            ends += [len(ids) + trained] if trained else []
            ids += more
            mask += [n < trained for n in range(len(more))]
        return _encoded(ids, mask, ends)

    def pair(self, prompt: str, completion: str) -> Encoded:
        """Prompt and completion as they stand, the completion and an end token trained."""
        first, second = self.opening + self._encode(prompt)[0], self._continued(completion, behind=bool(prompt))[0]
        end = self.tokenizer.eos_token_id
        second += [] if end is None else [end]
        ids = first + second
        return _encoded(ids, [False] * len(first) + [True] * len(second), [len(ids)] if second else [])

    def _continued(self, text: str, *, behind: bool) -> tuple[list[int], list[int]]:
        """Ids of a text, `behind` another one or not, and the characters they begin at."""
        if not self._begins_anew or not behind:
            ids, offsets = self._encode(text)
            return ids, [start for start, _ in offsets]
        for anchor in _ANCHORS:
            head = self._encode(anchor)[0]
            ids, offsets = self._encode(anchor + text)
            if ids[: len(head)] == head:
                return ids[len(head) :], [max(start - len(anchor), 0) for start, _ in offsets[len(head) :]]
        raise UnsupportedModel("The base model's tokenizer cannot read a text as the end of another.", param="model")

    def _encode(self, text: str) -> Tokens:
        if not text:
            return [], []
        if text in self._ahead:
            ids, offsets = self._ahead[text]
            return list(ids), offsets
        encoded = tokenizer_time.read(self.tokenizer, text, add_special_tokens=False)
        return list(encoded.input_ids), list(encoded.offset_mapping)


def pieces(text: str, spans: Sequence[Span]) -> list[str]:
    """What of a rendered conversation is read by itself: the text up to the first answer, and what `_pieces` cuts."""
    return [text[: spans[0].start], *(piece for piece, _ in _pieces(text, spans))]


def _pieces(text: str, spans: Sequence[Span]) -> Iterator[tuple[str, int]]:
    """The text from the first answer on, cut where answers begin, and how many characters of each are an answer's.

    Also cut where one ends, unless a control token does: what follows would be merged into the answer's last token,
    while a control token stays itself and may take white space behind it.
    """
    borders = [*(span.start for span in spans[1:]), len(text)]
    for span, border in zip(spans, borders, strict=True):
        cut = border if span.closed else span.end
        yield text[span.start : cut], span.end - span.start
        if cut < border:
            yield text[cut:border], 0


def _encoded(ids: list[int], mask: list[bool], ends: list[int]) -> Encoded:
    return Encoded(torch.tensor(ids, dtype=torch.int32), torch.tensor(mask, dtype=torch.bool), ends)
