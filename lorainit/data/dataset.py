"""The rows of a file as masked token sequences, what was left out of it, and whether it can be used.

What cannot be learned from is refused here, before any training. Knows nothing of adapters or devices.
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


def count_lines(path: str | Path) -> int:
    """Lines of a file, the last of which may be empty."""
    with Path(path).open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b"")) + 1


def file_sha256(path: str | Path) -> str:
    """Lower-case hex."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
