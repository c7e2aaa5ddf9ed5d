"""From the rows of a file to token sequences with a mask of what is trained.

A chat is rendered by the base's chat template (`lorainit.data.chat`). The text is cut where an answer begins, and each
piece is tokenized by itself. The reason: a server tokenizes the prompt alone and the model continues it, so in use no
token contains characters of both.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lorainit.config.errors import UnsupportedModel
from lorainit.data.chat import tokenizer_time
from lorainit.data.chat.stops import stop_tokens
from lorainit.data.chat.template import Template
from lorainit.data.chat.turns import Span
from lorainit.data.dataset import Dataset, Sample, file_sha256, refuse
from lorainit.data.formats.conversation import Fault
from lorainit.data.formats.rows import BadRow, Problem, Row, make_problem, read_rows

TICK_ROWS = 64
# Rows that are tokenized in one call, because that takes half the time of a call for each. The number of characters is
# limited too, since the tokens of all these rows are in memory at once.
TOGETHER_ROWS, TOGETHER_CHARACTERS = 64, 1 << 20
# Ids, and the characters that each of them stands for.
Tokens = tuple[list[int], list[tuple[int, int]]]
# Texts to put before another one. They are of different kinds, so that a tokenizer does not merge all of them with it.
_ANCHORS = ("\n", "a", ".", "0")


# --- one row ------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """Token ids, a mask of the same length (True = trained), and the number of tokens up to the end of each answer."""

    ids: Tensor
    trained: Tensor
    ends: list[int]


class Encoder:
    """Tokenizes texts with trained spans, and pairs of prompt and completion."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        bare = tokenizer("a", add_special_tokens=False).input_ids
        full = tokenizer("a").input_ids
        # The tokens that the tokenizer adds before a text by itself (a begin-of-text token, or nothing).
        self.opening: list[int] = full[: full.index(bare[0])] if bare and bare[0] in full else []
        # Tokens of pieces that were read in advance.
        self._ahead: dict[str, Tokens] = {}
        # Whether a text gets other tokens at a beginning than behind another text: some tokenizers add a space there.
        self._begins_anew = self._encode("\na")[0] != self._encode("\n")[0] + self._encode("a")[0]

    def tokenize_ahead(self, texts: Iterable[Sequence[str]]) -> None:
        """Tokenize several texts in one call, which takes half the time.

        `encode_text` and `encode_pair` then use the results.

        Args:
            texts: for each text its pieces, as `split_into_pieces` returns them.
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
        # An error is ignored: each text is then tokenized alone, so that the row with the fault can be named.
        with suppress(UnsupportedModel):
            found = tokenizer_time.read(self.tokenizer, list(wanted), add_special_tokens=False)
            self._ahead = dict(zip(wanted, zip(found.input_ids, found.offset_mapping, strict=True), strict=True))

    def encode_text(self, text: str, spans: Sequence[Span]) -> Encoded:
        """Tokens of a rendered conversation. Those of the spans are trained."""
        ids, ends = self._encode(text[: spans[0].start])[0], list[int]()
        mask = [False] * len(ids)
        for piece, answer in _pieces(text, spans):
            more, starts = self._continued(piece, behind=len(ids) > 0)
            # Safe, because with `trim_offsets` a token's start may be later than it really is, but never earlier.
            trained = next((n for n, start in enumerate(starts) if start >= answer), len(more))
            ends += [len(ids) + trained] if trained else []
            ids += more
            mask += [n < trained for n in range(len(more))]
        return _encoded(ids, mask, ends)

    def encode_pair(self, prompt: str, completion: str) -> Encoded:
        """Tokens of a prompt and its completion, without a template. The completion and an end token are trained."""
        first, second = self.opening + self._encode(prompt)[0], self._continued(completion, behind=bool(prompt))[0]
        end = self.tokenizer.eos_token_id
        second += [] if end is None else [end]
        ids = first + second
        return _encoded(ids, [False] * len(first) + [True] * len(second), [len(ids)] if second else [])

    def _continued(self, text: str, *, behind: bool) -> tuple[list[int], list[int]]:
        """Ids of a text, and the characters at which they begin. `behind`: another text stands before it.

        A text behind another one is tokenized behind an anchor, whose tokens are then removed, because otherwise some
        tokenizers would add a space before it.
        """
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


def split_into_pieces(text: str, spans: Sequence[Span]) -> list[str]:
    """The pieces of a rendered conversation that are tokenized one by one: the text before the first answer, ..."""
    return [text[: spans[0].start], *(piece for piece, _ in _pieces(text, spans))]


def _pieces(text: str, spans: Sequence[Span]) -> Iterator[tuple[str, int]]:
    """The text from the first answer on, cut where answers begin, with the number of answer characters in each piece.

    It is also cut where an answer ends without a control token, because otherwise the answer's last token might contain
    text that follows. A control token is never merged with other text, and may include white space behind it.
    """
    borders = [*(span.start for span in spans[1:]), len(text)]
    for span, border in zip(spans, borders, strict=True):
        cut = border if span.closed else span.end
        yield text[span.start : cut], span.end - span.start
        if cut < border:
            yield text[cut:border], 0


def _encoded(ids: list[int], mask: list[bool], ends: list[int]) -> Encoded:
    # int32, because a file's rows are all kept in memory and int64 would take twice as much.
    return Encoded(torch.tensor(ids, dtype=torch.int32), torch.tensor(mask, dtype=torch.bool), ends)


# --- one file -----------------------------------------------------------------------------------


def load(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int,
    folder: Path | None = None,
    append_eos: bool = False,
    on_row_error: Literal["fail", "skip"] = "fail",
    param: str = "data.training",
    on_tick: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Read and tokenize a file.

    Args:
        max_length: tokens; longer rows are cut at the end and counted.
        folder: the base model's, whose files name the tokens at which it stops; None = only the tokenizer's end token.
        append_eos: train the tokenizer's end token behind a last answer that ends with no token to stop at.
        on_row_error: "skip" leaves bad rows out and keeps them in `problems`.
        param: which file it is, a field of the spec: `data.training`, `data.validation` or `data.calibration`.
        on_tick: called with (line, lines in all) every `TICK_ROWS` rows.

    Raises:
        InvalidTrainingFile, InvalidValidationFile: a row cannot be used (with "fail"), or none can.
        NoTrainableTokens: every row is masked or cut before its first trained token.
        UnsupportedModel: the chat template renders, or the tokenizer reads, none of the rows, or there is no end token
            to append.
    """
    data = tokenize(path, tokenizer, max_length=max_length, folder=folder, append_eos=append_eos, on_tick=on_tick)
    refuse(data, on_row_error, param)
    return data


def tokenize(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int,
    folder: Path | None = None,
    append_eos: bool = False,
    sha256: str | None = None,
    on_tick: Callable[[int, int], None] | None = None,
) -> Dataset:
    """As `load`, without refusing bad rows. The result depends only on the arguments, so that it can be cached.

    Args:
        sha256: the file's digest, if the caller has computed it; None = it is computed here.

    Raises:
        UnsupportedModel: there is no end token to append, or the chat template must not be run.
    """
    if append_eos and tokenizer.eos_token_id is None:
        raise UnsupportedModel("The base model's tokenizer has no end token to append.", param="data.append_eos")
    reader = _Reader(tokenizer, max_length, stop_tokens(tokenizer, folder), append_eos=append_eos)
    total = _count_lines(path)
    for number, row in enumerate(read_rows(path), start=1):
        reader.take(row)
        if on_tick and number % TICK_ROWS == 0:
            on_tick(row.line, total)
    reader.finish()
    return Dataset(
        samples=reader.samples,
        sha256=sha256 or file_sha256(path),
        rows=reader.rows,
        truncated=reader.truncated,
        problems=reader.problems,
        warnings=reader.warnings,
        remarks=list(reader.remarks.values()),
    )


def _count_lines(path: str | Path) -> int:
    """Lines of a file. A last line that is empty counts too."""
    with Path(path).open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b"")) + 1


class _Draft(NamedTuple):
    """A row as text: the pieces of it that are tokenized by themselves, and the function that makes tokens of them."""

    pieces: Sequence[str]
    encode: Callable[[], Encoded]
    warnings: tuple[Fault, ...] = ()


class _Reader:
    """Collects the samples of a file, and the problems and warnings of its rows."""

    def __init__(self, tokenizer: Any, max_length: int, stops: frozenset[int], *, append_eos: bool) -> None:
        self.tokenizer = tokenizer
        self.template = Template(tokenizer, stops=stops)
        self.encoder = Encoder(tokenizer)
        self.stops = stops
        self.append_eos = append_eos
        self.max_length = max_length
        self.samples: list[Sample] = []
        self.problems: list[Problem] = []
        self.warnings: Counter[str] = Counter()
        self.remarks: dict[str, Problem] = {}
        self.rows = self.truncated = self._characters = 0
        self._waiting: list[tuple[Row | BadRow, _Draft | Fault | None]] = []

    def take(self, row: Row | BadRow) -> None:
        """Add the next row. It is tokenized later, together with others."""
        draft = None if isinstance(row, BadRow) else self._draft(row)
        self._waiting.append((row, draft))
        self._characters += sum(map(len, draft.pieces)) if isinstance(draft, _Draft) else 0
        if len(self._waiting) == TOGETHER_ROWS or self._characters > TOGETHER_CHARACTERS:
            self.finish()

    def finish(self) -> None:
        """Tokenize the rows that were added and are still waiting."""
        self.encoder.tokenize_ahead(draft.pieces for _, draft in self._waiting if isinstance(draft, _Draft))
        for row, draft in self._waiting:
            self._read(row, draft)
        self._waiting, self._characters = [], 0

    def _read(self, row: Row | BadRow, draft: "_Draft | Fault | None") -> None:
        self.rows += 1
        if isinstance(row, BadRow):
            self.problems += row.problems
            return
        self.warnings.update(w.code for w in row.warnings)
        assert draft is not None
        sample = draft if isinstance(draft, Fault) else self._encoded(row.line, draft)
        if isinstance(sample, Fault):
            self.problems.append(make_problem(row.line, sample))
            return
        if len(sample.ids) > self.max_length:
            self.truncated += 1
            self.warnings["truncated"] += 1
            sample = Sample(sample.line, sample.ids[: self.max_length], sample.trained[: self.max_length])
        if not sample.trained[1:].any():
            text = f"no trained token is left within max_length {self.max_length}."
            self.problems.append(make_problem(row.line, Fault("no_trainable_tokens", None, text)))
            return
        self.samples.append(sample)

    def _draft(self, row: Row) -> "_Draft | Fault":
        if row.kind == "preference":
            return Fault("missing_messages_list", None, "a preference row cannot be used in supervised training.")
        if fault := self.template.control_token_fault(row.value, ""):
            return fault
        if row.kind == "prompt_completion":
            pair = row.value["prompt"], row.value["completion"]
            return _Draft(pair, lambda: self.encoder.encode_pair(*pair))
        rendered = self.template.render(row.value)
        if isinstance(rendered, Fault):
            return rendered
        text, spans = rendered.text, rendered.spans
        return _Draft(split_into_pieces(text, spans), lambda: self.encoder.encode_text(text, spans), rendered.warnings)

    def _encoded(self, line: int, draft: "_Draft") -> Sample | Fault:
        """The sample of a row, or the fault if the tokenizer cannot read it."""
        for fault in draft.warnings:
            self._warn(line, fault)
        try:
            found = draft.encode()
        except UnsupportedModel as error:
            return Fault("tokenizer_error", None, error.message)
        endless = [end for end in found.ends if int(found.ids[end - 1]) not in self.stops]
        if self.append_eos and endless and endless[-1] == found.ends[-1]:
            found = self._with_end(found)
            endless.pop()
        if endless:
            self._warn(line, self._no_stop(found, endless))
        return Sample(line, found.ids, found.trained)

    def _with_end(self, found: Encoded) -> Encoded:
        """Add the tokenizer's end token behind the last answer, and drop everything after it."""
        last = found.ends[-1]
        ids = torch.cat([found.ids[:last], torch.tensor([self.tokenizer.eos_token_id], dtype=torch.int32)])
        return Encoded(ids, torch.cat([found.trained[:last], torch.tensor([True])]), [*found.ends[:-1], last + 1])

    def _no_stop(self, found: Encoded, endless: list[int]) -> Fault:
        token = self.tokenizer.decode([int(found.ids[endless[0] - 1])])
        if endless == found.ends[-1:]:
            text = (
                f"the last answer ends with {token!r}, at which the model does not stop: append_eos adds its end token."
            )
            return Fault("no_stop_token", None, text)
        text = (
            f"{len(endless)} of {len(found.ends)} answers end with a token at which the model does not stop, the first"
            f" of them with {token!r}. append_eos helps a last answer only: make a row for each answer, in which it is"
            " the last one and those before it have weight 0."
        )
        return Fault("no_stop_token", None, text)

    def _warn(self, line: int, fault: Fault) -> None:
        self.warnings[fault.code] += 1
        self.remarks.setdefault(fault.code, make_problem(line, fault))
