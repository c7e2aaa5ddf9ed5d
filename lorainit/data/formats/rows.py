"""Training files: JSONL rows with their line numbers, and the verdict on a whole file.

Streams with bounded memory: a file may be far larger than it. Model-independent, torch-free; what
one row may look like is in `conversation`, what a tokenizer makes of it in `data`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorainit.data.formats import strict_json
from lorainit.data.formats.conversation import Fault, Kind, faults, is_plain, kind_of, normalized, warnings
from lorainit.data.formats.padding import without_padding

MAX_LINE_BYTES = 8 * 1024 * 1024
KEPT_PROBLEMS = 20
# A line of 8 MB can hold four million faults. Nobody reads more, and counting them would take the time of a large file.
COUNTED_IN_A_ROW = 1000
LONGEST_TEXT, LONGEST_PLACE = 500, 250  # of a problem: a key that is quoted may be as long as its line
FEW_ROWS = 10
# Digests are kept of the first so many rows only, so that memory stays bounded (about 50 MB).
DUPLICATE_WINDOW = 500_000
_ARRAY = Fault(
    "invalid_json",
    None,
    "the file is one JSON array, and rows are JSON Lines: one object a line, without the array's brackets and commas.",
)
_NO_KIND = Fault(
    "missing_messages_list",
    "messages",
    "messages is missing: a row has messages, or prompt and completion.",
)


class Problem(BaseModel):
    """One error or warning; `line` counts from 1, null when it is about the whole file."""

    model_config = ConfigDict(frozen=True)

    line: int | None
    code: str
    param: str | None
    message: str


class FileReport(BaseModel):
    """What `check_file` found. `model_dump()` is exactly the `validation` object of a File.

    `error_count` and `warning_count` are complete but for rows with more than 1,000 faults, of which that many are
    counted; the lists hold the first 20. The attributes
    `status` (`processed` or `error`), `status_details` (a sentence, or None when there is nothing
    to say) and `duplicates` belong beside that object and are not dumped.
    """

    model_config = ConfigDict(frozen=True)

    kind: Kind | None
    rows: int
    valid_rows: int
    error_count: int
    warning_count: int
    errors: list[Problem]
    warnings: list[Problem]
    duplicates: int = Field(exclude=True)
    status: Literal["processed", "error"] = Field(exclude=True)
    status_details: str | None = Field(exclude=True)


@dataclass(frozen=True)
class Row:
    """A valid row in normalized shape (see `conversation.normalized`)."""

    line: int
    kind: Kind
    value: dict[str, Any]
    warnings: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: the first things wrong with it, and how many there are (at most 1,000 are counted)."""

    line: int
    problems: tuple[Problem, ...]
    count: int = 1


def problem(line: int, fault: Fault) -> Problem:
    """A fault of a row, placed in its file."""
    text = f"Line {line}: {_shortened(fault.text, LONGEST_TEXT)}"
    place = fault.param and _shortened(fault.param, LONGEST_PLACE)
    return Problem(line=line, code=fault.code, param=place, message=text)


def _shortened(text: str, most: int) -> str:
    text = text.replace("\0", "\N{SYMBOL FOR NULL}")  # which a database cannot store
    return text if len(text) <= most else f"{text[: most - 1]}…"


def read_rows(path: str | Path) -> Iterator[Row | BadRow]:
    """The rows of a JSONL file in order, good and bad; blank lines are skipped but counted."""
    with Path(path).open("rb") as stream:
        for row in _scan(stream):
            yield replace(row, value=normalized(row.value, row.kind)) if isinstance(row, Row) else row


def check_file(source: BinaryIO | str | Path) -> FileReport:
    """Read a whole file once and report on it. Never raises for what the file contains.

    Args:
        source: a path, or a binary stream at its beginning (only `readline` is used).
    """
    if isinstance(source, str | Path):
        with Path(source).open("rb") as stream:
            return check_file(stream)
    counts = _Counts()
    for row in _scan(source, counts):
        counts.add(row)
    return counts.report()


@dataclass
class _Counts:
    """The running counts of one pass over a file."""

    kind: Kind | None = None
    rows: int = 0
    valid: int = 0
    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    error_count: int = 0
    warning_count: int = 0
    mixed: bool = False
    duplicates: int = 0
    digests: set[bytes] = field(default_factory=set)

    def add(self, row: Row | BadRow) -> None:
        self.rows += 1
        if isinstance(row, Row):
            self.valid += 1
            self._keep_warnings(row.warnings)
            return
        self.error_count += row.count
        self.errors += row.problems

    def _keep_warnings(self, found: tuple[Problem, ...]) -> None:
        self.warning_count += len(found)
        self.duplicates += sum(p.code == "duplicate_row" for p in found)
        self.warnings += found[: KEPT_PROBLEMS - len(self.warnings)]

    def report(self) -> FileReport:
        if 0 < self.rows < FEW_ROWS:
            text = f"The file has only {self.rows} {'row' if self.rows == 1 else 'rows'}."
            self._keep_warnings((Problem(line=None, code="few_rows", param=None, message=text),))
        return FileReport(
            kind=self.kind,
            rows=self.rows,
            valid_rows=self.valid,
            error_count=self.error_count,
            warning_count=self.warning_count,
            errors=self.errors,
            warnings=self.warnings,
            duplicates=self.duplicates,
            status="error" if self.mixed or not self.valid else "processed",
            status_details=self._details(),
        )

    def _details(self) -> str | None:
        if not self.rows:
            return "the file has no rows"
        if self.rows == self.valid:
            return None
        first = next((p for p in self.errors if p.code == "mixed_formats" or not self.mixed), self.errors[0])
        sentence = first.message.removeprefix(f"Line {first.line}: ").removesuffix(".")
        where = f"first: line {first.line}: {first.code}: {sentence}"
        if self.mixed:
            return f"the rows are of mixed kinds; {where}"
        bad = self.rows - self.valid
        return f"{bad} of {self.rows} {'row is' if self.rows == 1 else 'rows are'} invalid; {where}"


def _scan(stream: BinaryIO, counts: _Counts | None = None) -> Iterator[Row | BadRow]:
    """Rows of a stream as they were sent; the first row that names a kind decides that of the file."""
    counts = counts or _Counts()
    lines = _lines(stream)
    opening = list(islice(lines, 2))
    if opening and opening[0][1] and _opens_an_array(opening[0][1], alone=len(opening) == 1):
        yield _make_bad_row(opening[0][0], iter((_ARRAY,)), counts)
        return  # its other lines are no rows that could be wrong one by one
    for line, raw in chain(opening, lines):
        doubled = list[str]()
        row = _parse(raw, doubled)
        if isinstance(row, dict):
            kind = kind_of(row)
            counts.kind = counts.kind or kind
            yield _check_row(line, row, kind, counts, raw or b"", doubled)
        else:
            yield _make_bad_row(line, iter((row,)), counts)


def _make_bad_row(line: int, found: Iterator[Fault], counts: _Counts) -> BadRow:
    """A row with these faults; none of them is put into words that a report has no room for any more."""
    kept = tuple(problem(line, fault) for fault in islice(found, KEPT_PROBLEMS - len(counts.errors)))
    return BadRow(line, kept, len(kept) + sum(1 for _ in islice(found, COUNTED_IN_A_ROW - len(kept))))


def _check_row(
    line: int, row: dict[str, Any], kind: Kind | None, counts: _Counts, raw: bytes, doubled: list[str]
) -> Row | BadRow:
    if kind is None:
        return _make_bad_row(line, iter((_NO_KIND,)), counts)
    if kind != counts.kind:
        counts.mixed = True
        return _make_bad_row(
            line, iter((Fault("mixed_formats", None, f"this is a {kind} row in a {counts.kind} file."),)), counts
        )
    notes = list[Problem]()
    if doubled or not is_plain(row):
        found = faults(row, kind)
        if (first := next(found, None)) is not None:
            return _make_bad_row(line, chain((first,), found), counts)
        notes += [problem(line, fault) for fault in warnings(row, kind, doubled)]
    digest = blake2b(raw.strip(), digest_size=8).digest()
    if digest in counts.digests:
        notes.append(problem(line, Fault("duplicate_row", None, "the same row appears earlier in the file.")))
    elif len(counts.digests) < DUPLICATE_WINDOW:
        counts.digests.add(digest)
    return Row(line, kind, row, tuple(notes))


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, bytes without line end) of non-blank lines; None for a line that is too long."""
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 2):
        number += 1
        complete = raw.endswith(b"\n")
        text = raw.rstrip(b"\r\n")
        if number == 1:
            text = text.removeprefix(b"\xef\xbb\xbf")
        if len(text) > MAX_LINE_BYTES:
            yield number, None
        elif text.strip():
            yield number, text
        while not complete and (rest := stream.readline(MAX_LINE_BYTES)):
            complete = rest.endswith(b"\n")


def _opens_an_array(raw: bytes, *, alone: bool) -> bool:
    """Whether the first line begins a JSON array of rows, on this line alone or over many.

    Where it is a whole array and not alone, each line is one, and each of them is a bad row.
    """
    if not raw.lstrip().startswith(b"["):
        return False
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        return True
    return alone and bool(row) and isinstance(row[0], dict)


def _parse(raw: bytes | None, doubled: list[str]) -> dict[str, Any] | Fault:
    """One row without its padding; the first key that an object of it has twice goes to `doubled`."""
    if raw is None:
        return Fault("line_too_long", None, f"the line is longer than {MAX_LINE_BYTES} bytes.")
    try:
        row = strict_json.read(raw, doubled)
    except UnicodeDecodeError as error:
        return Fault("invalid_utf8", None, f"byte {error.start + 1} of the line is not UTF-8.")
    except strict_json.Unreadable as error:
        return Fault(error.code, None, str(error))
    if not isinstance(row, dict):
        what = "a list, and a row is an object" if isinstance(row, list) else "not an object"
        return Fault("data_type", None, f"the row is {what}.")
    return without_padding(row) if b"null" in raw or b"[]" in raw else row
