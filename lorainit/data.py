"""Rows to masked token sequences, their order, and padded batches.

Everything a run learns from passes through `load`; what cannot be learned from is refused here,
before any training. Knows nothing of adapters or devices.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lorainit.conversation import Fault
from lorainit.errors import InvalidTrainingFile, InvalidValidationFile, LorainitError, NoTrainableTokens
from lorainit.refusal import as_unsupported
from lorainit.rows import BadRow, Problem, Row, problem, read_rows
from lorainit.template import Template

TICK_ROWS = 64
_ERRORS: dict[str, type[LorainitError]] = {
    "lora.init.calibration_file": InvalidTrainingFile,
    "training_file": InvalidTrainingFile,
    "validation_file": InvalidValidationFile,
}


@dataclass(frozen=True)
class Sample:
    """One row: token ids, and which of them the loss looks at (same length)."""

    line: int
    ids: Tensor
    trained: Tensor


@dataclass(frozen=True)
class Dataset:
    """The usable rows of one file, the SHA-256 of its bytes, and what was left out."""

    samples: list[Sample]
    sha256: str
    rows: int
    truncated: int
    problems: list[Problem]
    warnings: Counter[str]

    @property
    def trained_tokens(self) -> int:
        """Tokens per epoch the loss looks at; the first token of a row has no prediction."""
        return sum(int(s.trained[1:].sum()) for s in self.samples)


# --- one file ----------------------------------------------------------------------------------


def load(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int,
    on_row_error: Literal["fail", "skip"] = "fail",
    param: str = "training_file",
    on_tick: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Read and tokenize a file.

    Args:
        max_length: tokens; longer rows are cut at the end and counted.
        on_row_error: "skip" leaves bad rows out and keeps them in `problems`.
        param: which file it is in error messages, `training_file` or `validation_file`.
        on_tick: called with (line, lines in all) now and then.

    Raises:
        InvalidTrainingFile, InvalidValidationFile: a row cannot be used (with "fail"), or none can.
        NoTrainableTokens: every row is masked or cut before its first trained token.
        UnsupportedModel: the chat template cannot do what the rows need.
    """
    data = tokenize(path, tokenizer, max_length=max_length, on_tick=on_tick)
    refuse(data, on_row_error, param)
    return data


def tokenize(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int,
    on_tick: Callable[[int, int], None] | None = None,
) -> Dataset:
    """What `load` reads, before anybody judges it: depends on the file, the tokenizer and `max_length` alone."""
    reader = _Reader(tokenizer, max_length)
    total = _count_lines(path)
    for row in read_rows(path):
        reader.read(row)
        if on_tick and reader.rows % TICK_ROWS == 0:
            on_tick(row.line, total)
    return Dataset(reader.samples, file_sha256(path), reader.rows, reader.truncated, reader.problems, reader.warnings)


class _Reader:
    """Collects the samples of a file and everything that is wrong with it."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.template = Template(tokenizer)
        self.encode = Encoder(tokenizer)
        self.max_length = max_length
        self.samples: list[Sample] = []
        self.problems: list[Problem] = []
        self.warnings: Counter[str] = Counter()
        self.rows = self.truncated = 0

    def read(self, row: Row | BadRow) -> None:
        self.rows += 1
        if isinstance(row, BadRow):
            self.problems += row.problems
            return
        self.warnings.update(w.code for w in row.warnings)
        sample = self._sample(row)
        if isinstance(sample, Fault):
            self.problems.append(problem(row.line, sample))
            return
        if len(sample.ids) > self.max_length:
            self.truncated += 1
            self.warnings["truncated"] += 1
            sample = Sample(sample.line, sample.ids[: self.max_length], sample.trained[: self.max_length])
        if not sample.trained[1:].any():
            text = f"no trained token is left within max_length {self.max_length}."
            self.problems.append(problem(row.line, Fault("no_trainable_tokens", None, text)))
            return
        self.samples.append(sample)

    def _sample(self, row: Row) -> Sample | Fault:
        if row.kind == "preference":
            return Fault("missing_messages_list", None, "a preference row cannot be used in supervised training.")
        if fault := self.template.control_token_fault(row.value, ""):
            return fault
        if row.kind == "prompt_completion":
            return Sample(row.line, *self.encode.pair(row.value["prompt"], row.value["completion"]))
        rendered = self.template.render(row.value)
        if isinstance(rendered, Fault):
            return rendered
        return Sample(row.line, *self.encode.text(rendered.text, rendered.spans))


class Encoder:
    """Text and trained spans to token ids and a mask of the same length."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        bare = tokenizer("a", add_special_tokens=False).input_ids
        full = tokenizer("a").input_ids
        # What the tokenizer puts before a text of its own accord (a begin-of-text token, or nothing).
        self.opening: list[int] = full[: full.index(bare[0])] if bare and bare[0] in full else []

    def text(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Tokens of a rendered conversation; trained are those that lie wholly inside a span."""
        ids, offsets = self._encode(text)
        return _tensors(ids, [any(s <= a < b <= e for s, e in spans) for a, b in offsets])

    def pair(self, prompt: str, completion: str) -> tuple[Tensor, Tensor]:
        """Prompt and completion as they stand, the completion and an end token trained.

        The two are tokenized as one text, unless a token would straddle the border.
        """
        border = len(prompt)
        ids, offsets = self._encode(prompt + completion)
        mask = [a >= border and b > a for a, b in offsets]
        if any(a < border < b for a, b in offsets):
            first, second = self._encode(prompt)[0], self._encode(completion)[0]
            ids, mask = first + second, [False] * len(first) + [True] * len(second)
        end = self.tokenizer.eos_token_id
        closing = [] if end is None else [end]
        ids, mask = self.opening + ids + closing, [False] * len(self.opening) + mask + [True] * len(closing)
        return _tensors(ids, mask)

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        with as_unsupported("The base model's tokenizer cannot read a text"):
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoded.input_ids), list(encoded.offset_mapping)


def _tensors(ids: list[int], mask: list[bool]) -> tuple[Tensor, Tensor]:
    return torch.tensor(ids, dtype=torch.int32), torch.tensor(mask, dtype=torch.bool)


def refuse(data: Dataset, on_row_error: str, param: str) -> None:
    """Raise what `load` promises for a file that cannot be used as it is."""
    bad = len({p.line for p in data.problems})
    name = param.replace("_", " ")
    masked = bool(data.problems) and all(p.code == "no_trainable_tokens" for p in data.problems)
    if not data.samples and masked:
        raise NoTrainableTokens(f"No row of the {name} has a token to train on.", param=param)
    if not data.rows:
        raise _ERRORS[param](f"The {name} has no rows.", param=param)
    if bad and (on_row_error == "fail" or not data.samples):
        first = data.problems[0]
        raise _ERRORS[param](
            f"{bad} of {data.rows} rows of the {name} cannot be used; first: {first.code}: {first.message}",
            param=param,
        )


def _count_lines(path: str | Path) -> int:
    with Path(path).open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b"")) + 1


def file_sha256(path: str | Path) -> str:
    """Lower-case hex."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
