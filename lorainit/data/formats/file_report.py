"""The report on a whole training file: how many rows can be used, and what is wrong with the others.

The file is read as a stream, because it may be larger than memory. Does not import torch.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorainit.data.formats.conversation import Kind
from lorainit.data.formats.rows import KEPT_PROBLEMS, BadRow, Problem, Row, Seen, scan

FEW_ROWS = 10


class FileReport(BaseModel):
    """The result of `check_file`. `model_dump()` is exactly the `validation` object of a File.

    `error_count` and `warning_count` count everything, but at most 1,000 faults of one row. The lists have the first
    20. `status` (`processed` or `error`), `status_details` (a sentence, or None) and `duplicates` are not dumped,
    because they do not belong to that object.
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


def check_file(source: BinaryIO | str | Path) -> FileReport:
    """Read a whole file once and report on it. Never raises for what the file contains.

    Args:
        source: a path, or a binary stream at its beginning (only `readline` is used).
    """
    if isinstance(source, str | Path):
        with Path(source).open("rb") as stream:
            return check_file(stream)
    counts = _Counts()
    for row in scan(source, counts.seen):
        counts.add(row)
    return counts.report()


@dataclass
class _Counts:
    """The running counts of one pass over a file."""

    seen: Seen = field(default_factory=Seen)
    rows: int = 0
    valid: int = 0
    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    error_count: int = 0
    warning_count: int = 0
    duplicates: int = 0

    def add(self, row: Row | BadRow) -> None:
        self.rows += 1
        if isinstance(row, Row):
            self.valid += 1
            self._keep_warnings(row.warnings)
            return
        self.error_count += row.count
        self.errors += row.problems
        self.seen.messages_left -= len(row.problems)

    def _keep_warnings(self, found: tuple[Problem, ...]) -> None:
        self.warning_count += len(found)
        self.duplicates += sum(p.code == "duplicate_row" for p in found)
        self.warnings += found[: KEPT_PROBLEMS - len(self.warnings)]

    def report(self) -> FileReport:
        if 0 < self.rows < FEW_ROWS:
            text = f"The file has only {self.rows} {'row' if self.rows == 1 else 'rows'}."
            self._keep_warnings((Problem(line=None, code="few_rows", param=None, message=text),))
        return FileReport(
            kind=self.seen.kind,
            rows=self.rows,
            valid_rows=self.valid,
            error_count=self.error_count,
            warning_count=self.warning_count,
            errors=self.errors,
            warnings=self.warnings,
            duplicates=self.duplicates,
            status="error" if self.seen.mixed or not self.valid else "processed",
            status_details=self._details(),
        )

    def _details(self) -> str | None:
        if not self.rows:
            return "the file has no rows"
        if self.rows == self.valid:
            return None
        first = next((p for p in self.errors if p.code == "mixed_formats" or not self.seen.mixed), self.errors[0])
        sentence = first.message.removeprefix(f"Line {first.line}: ").removesuffix(".")
        where = f"first: line {first.line}: {first.code}: {sentence}"
        if self.seen.mixed:
            return f"the rows are of mixed kinds; {where}"
        bad = self.rows - self.valid
        return f"{bad} of {self.rows} {'row is' if self.rows == 1 else 'rows are'} invalid; {where}"
