"""What was found when one case was tried on one kind of base."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

Precision = Literal["fp32", "bf16", "nf4"]
Verdict = Literal["works", "refused", "late", "wrong", "crashed"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "nf4")
INSPECT, ENGINE = "inspect", "engine"
# Largest relative difference that is rounding in fp32.
EXACT = 1e-4
# In bf16 nothing is exact: our error may be so many times that of stock bf16 against stock fp32.
BF16 = 2.0
# Whole jobs: an initialization for every kind of evidence (nothing, weights, gradients, activations, a preheat).
METHODS = ("kaiming", "pissa", "lora_one", "eva", "hrp")
MORE_METHODS = ("loram", "corda")  # in fp32 only: of kinds that are there already
NF4_METHODS = ("kaiming", "lora_one")  # what differs is the base, not what is made of it


class Case(NamedTuple):
    """`what`: "inspect", "engine" (losses and gradients of one step), or an initialization (a whole job)."""

    what: str
    precision: Precision = "fp32"  # nf4 computes in fp32

    def __str__(self) -> str:
        return self.what if self.what == INSPECT else f"{self.what} {self.precision}"


CASES = [
    Case(INSPECT),
    Case(ENGINE),
    Case(ENGINE, "bf16"),
    *(Case(method) for method in (*METHODS, *MORE_METHODS)),
    *(Case(method, "bf16") for method in METHODS),
    *(Case(method, "nf4") for method in NF4_METHODS),
]
# For what should be refused: it is asked when a model is looked at, and again when a job comes.
REFUSALS = [Case(INSPECT), Case("kaiming")]


@dataclass
class Finding:
    """The outcome.

    works: compared with stock transformers and PEFT, and the same. refused: before the first step, with a code and
    `sentence`. late: refused after it. wrong: it ended well and stock disagrees, or it was accepted and should not
    be. crashed: another exception than ours.
    """

    kind: str
    case: Case
    verdict: Verdict
    sentence: str = ""
    code: str = ""
    seconds: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"case": list(self.case)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Finding":
        return cls(**{**value, "case": Case(*value["case"])})


@dataclass
class Tried:
    """A case under way. `adapter`: a download that is still to be read on `base`.

    `rows`: token ids; `trained`, `before`: the trained model's logits on each of them, and the base's.
    """

    finding: Finding
    base: Path
    adapter: Path | None = None
    rows: list[Tensor] = field(default_factory=list)
    trained: list[Tensor] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)
