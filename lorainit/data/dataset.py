"""Rows to masked token sequences, their order, and padded batches.

Everything a run learns from passes through `load`; what cannot be learned from is refused here,
before any training. Knows nothing of adapters or devices.
"""

import hashlib
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lorainit.config.errors import (
    InvalidTrainingFile,
    InvalidValidationFile,
    LorainitError,
    NoTrainableTokens,
    UnsupportedModel,
)
from lorainit.config.spec import Data
from lorainit.data.chat.stops import stop_tokens
from lorainit.data.chat.template import Template
from lorainit.data.formats.conversation import Fault
from lorainit.data.formats.rows import KEPT_PROBLEMS, BadRow, Problem, Row, problem, read_rows
from lorainit.data.reader import Encoded, Encoder, pieces
from lorainit.system.host_failure import is_host_failure

TICK_ROWS = 64
# Rows that are tokenized in one call: it takes half the time of as many calls, and memory for all of them.
TOGETHER_ROWS, TOGETHER_CHARACTERS = 64, 1 << 20
_ERRORS: dict[str, type[LorainitError]] = {
    "data.calibration": InvalidTrainingFile,
    "data.training": InvalidTrainingFile,
    "data.validation": InvalidValidationFile,
}
# What is wrong with a row, and with the base if it is wrong with all of them.
_MODELS_FAULTS = {"template_error": "chat template renders", "tokenizer_error": "tokenizer reads"}


@dataclass(frozen=True)
class Sample:
    """One row: token ids, and which of them the loss looks at (same length)."""

    line: int
    ids: Tensor
    trained: Tensor


@dataclass(frozen=True)
class Dataset:
    """The usable rows of one file, the SHA-256 of its bytes, and what was left out.

    `warnings` counts by code; `remarks` holds the first warning of each code that needs the tokenizer, in words.
    """

    samples: list[Sample]
    sha256: str
    rows: int
    truncated: int
    problems: list[Problem]
    warnings: Counter[str]
    remarks: list[Problem]

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
    folder: Path | None = None,
    append_eos: bool = False,
    on_row_error: Literal["fail", "skip"] = "fail",
    param: str = "data.training",
    on_tick: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Read and tokenize a file.

    Args:
        max_length: tokens; longer rows are cut at the end and counted.
        folder: the base model's, which says at which tokens it stops; None = at the tokenizer's end token.
        append_eos: train that end token behind a last answer that ends with no token to stop at.
        on_row_error: "skip" leaves bad rows out and keeps them in `problems`.
        param: which file it is, a field of the spec: `data.training`, `data.validation` or `data.calibration`.
        on_tick: called with (line, lines in all) now and then.

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
    on_tick: Callable[[int, int], None] | None = None,
) -> Dataset:
    """What `load` reads, before anybody judges it: depends on the file, the base's folder and these options alone."""
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
        sha256=file_sha256(path),
        rows=reader.rows,
        truncated=reader.truncated,
        problems=reader.problems,
        warnings=reader.warnings,
        remarks=list(reader.remarks.values()),
    )


class _Draft(NamedTuple):
    """A row that is text: the pieces of it that are tokenized by themselves, and what makes tokens of them."""

    pieces: Sequence[str]
    encode: Callable[[], Encoded]
    warnings: tuple[Fault, ...] = ()


class _Reader:
    """Collects the samples of a file and everything that is wrong with it."""

    def __init__(self, tokenizer: Any, max_length: int, stops: frozenset[int], *, append_eos: bool) -> None:
        self.tokenizer = tokenizer
        self.template = Template(tokenizer, stops=stops)
        self.encode = Encoder(tokenizer)
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
        """The next row, which is tokenized together with others."""
        draft = None if isinstance(row, BadRow) else self._draft(row)
        self._waiting.append((row, draft))
        self._characters += sum(map(len, draft.pieces)) if isinstance(draft, _Draft) else 0
        if len(self._waiting) == TOGETHER_ROWS or self._characters > TOGETHER_CHARACTERS:
            self.finish()

    def finish(self) -> None:
        """Tokenize what has been taken."""
        self.encode.tokenize_ahead(draft.pieces for _, draft in self._waiting if isinstance(draft, _Draft))
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

    def _draft(self, row: Row) -> "_Draft | Fault":
        if row.kind == "preference":
            return Fault("missing_messages_list", None, "a preference row cannot be used in supervised training.")
        if fault := self.template.control_token_fault(row.value, ""):
            return fault
        if row.kind == "prompt_completion":
            pair = row.value["prompt"], row.value["completion"]
            return _Draft(pair, lambda: self.encode.pair(*pair))
        rendered = self.template.render(row.value)
        if isinstance(rendered, Fault):
            return rendered
        text, spans = rendered.text, rendered.spans
        return _Draft(pieces(text, spans), lambda: self.encode.text(text, spans), rendered.warnings)

    def _encoded(self, line: int, draft: "_Draft") -> Sample | Fault:
        """A tokenizer that has read other texts is told with the row that it cannot read."""
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
        """The tokenizer's end token behind the last answer, and nothing behind that."""
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
            f" of them with {token!r}. append_eos mends a last answer only: make each answer the last of a row of its"
            " own, with weight 0 on those before it."
        )
        return Fault("no_stop_token", None, text)

    def _warn(self, line: int, fault: Fault) -> None:
        self.warnings[fault.code] += 1
        self.remarks.setdefault(fault.code, problem(line, fault))


def require_readable(files: Data) -> None:
    """Refuse files that cannot be opened before anything expensive is done.

    Raises:
        InvalidTrainingFile, InvalidValidationFile: one is not there, is no plain file or may not be read.
    """
    named = {"training": files.training, "validation": files.validation, "calibration": files.calibration}
    for field, path in named.items():
        if path is None:
            continue
        error = _ERRORS[f"data.{field}"]
        try:
            plain = stat.S_ISREG(Path(path).stat().st_mode)  # a pipe would be read once, and we read more often
            if plain:
                Path(path).open("rb").close()
        except (OSError, ValueError) as fault:
            if is_host_failure(fault):
                raise
            why = fault.strerror if isinstance(fault, OSError) else str(fault)
            raise error(f"The {field} file {path} cannot be read: {why}.", param=f"data.{field}") from fault
        if not plain:
            raise error(f"The {field} file {path} is not a plain file.", param=f"data.{field}")


def name_of(param: str) -> str:
    """What a file is called in a sentence."""
    return f"{param.removeprefix('data.')} file"


def refuse(data: Dataset, on_row_error: str, param: str) -> None:
    """Raise what `load` promises for a file that cannot be used as it is."""
    bad = len({p.line for p in data.problems})
    name = name_of(param)
    masked = bool(data.problems) and all(p.code == "no_trainable_tokens" for p in data.problems)
    if not data.samples and masked:
        raise NoTrainableTokens(f"No row of the {name} has a token to train on.", param=param)
    if not data.rows:
        raise _ERRORS[param](f"The {name} has no rows.", param=param)
    for code, what in _MODELS_FAULTS.items():
        if not data.samples and all(p.code == code for p in data.problems):
            raise UnsupportedModel(
                f"The base model's {what} no row of the {name}; first: {data.problems[0].message}", param="model"
            )
    if bad and (on_row_error == "fail" or not data.samples):
        first = data.problems[0]
        raise _ERRORS[param](
            f"{bad} of {data.rows} rows of the {name} cannot be used; first: {first.code}: {first.message}"
            f"{_more(data.problems)}",
            param=param,
        )


def _more(problems: list[Problem]) -> str:
    """Where the other bad rows are, by code, as far as a message can hold them."""
    lines: dict[str, list[int]] = {}
    for one in dict.fromkeys((p.code, p.line) for p in problems[:KEPT_PROBLEMS]):
        lines.setdefault(one[0], []).append(one[1] or 0)
    if sum(map(len, lines.values())) < 2:
        return ""
    listed = "; ".join(f"{code} in {', '.join(map(str, found))}" for code, found in lines.items())
    rest = len(problems) - KEPT_PROBLEMS
    return f" All by line: {listed}" + (f", and {rest} more." if rest > 0 else ".")


def _count_lines(path: str | Path) -> int:
    with Path(path).open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b"")) + 1


def file_sha256(path: str | Path) -> str:
    """Lower-case hex."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
