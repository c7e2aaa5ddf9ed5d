"""The rows of a file as token sequences with a mask, which rows were left out, and whether the file can be used.

A file that cannot be trained on is refused here, before any training.
"""

import hashlib
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorainit.config.errors import (
    InvalidTrainingFile,
    InvalidValidationFile,
    LorainitError,
    NoTrainableTokens,
    UnsupportedModel,
)
from lorainit.config.spec import Data
from lorainit.data.formats.rows import KEPT_PROBLEMS, Problem
from lorainit.system.host_failure import is_host_failure

_ERRORS: dict[str, type[LorainitError]] = {
    "data.calibration": InvalidTrainingFile,
    "data.training": InvalidTrainingFile,
    "data.validation": InvalidValidationFile,
}
# Faults that a single row may have. If all rows have the same one, the base model is at fault and not the file.
_MODELS_FAULTS = {"template_error": "chat template renders", "tokenizer_error": "tokenizer reads"}


@dataclass(frozen=True)
class Sample:
    """One row: its line number, its token ids, and a mask of the same length: which tokens count in the loss."""

    line: int
    ids: Tensor
    trained: Tensor


@dataclass(frozen=True)
class Dataset:
    """The usable rows of one file, the SHA-256 of its bytes, and what was left out.

    `warnings`: how many there are of each code. `remarks`: the first warning of each code that needs the tokenizer,
    with its message.
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
        """Tokens per epoch that count in the loss. The first token of a row does not, because nothing predicts it."""
        return sum(int(s.trained[1:].sum()) for s in self.samples)


def require_readable(files: Data) -> None:
    """Refuse files that cannot be opened, before anything expensive is done.

    Raises:
        InvalidTrainingFile, InvalidValidationFile: one does not exist, is not a plain file or may not be read.
        OSError: the host has failed (`is_host_failure`), so the file is not to blame.
    """
    named = {"training": files.training, "validation": files.validation, "calibration": files.calibration}
    for field, path in named.items():
        if path is None:
            continue
        error = _ERRORS[f"data.{field}"]
        try:
            plain = stat.S_ISREG(Path(path).stat().st_mode)  # not a pipe, because the file is read more than once
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
    """The name of a file in messages: "training file" for "data.training"."""
    return f"{param.removeprefix('data.')} file"


def refuse(data: Dataset, on_row_error: str, param: str) -> None:
    """Raise the errors of `reader.load` for a file that cannot be used. `param` is its field in the spec."""
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
    """The lines of the bad rows, by code: at most `KEPT_PROBLEMS`, since a message should not be a long list."""
    lines: dict[str, list[int]] = {}
    for one in dict.fromkeys((p.code, p.line) for p in problems[:KEPT_PROBLEMS]):
        lines.setdefault(one[0], []).append(one[1] or 0)
    if sum(map(len, lines.values())) < 2:
        return ""
    listed = "; ".join(f"{code} in {', '.join(map(str, found))}" for code, found in lines.items())
    rest = len(problems) - KEPT_PROBLEMS
    return f" All by line: {listed}" + (f", and {rest} more." if rest > 0 else ".")


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file in lower-case hex."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
