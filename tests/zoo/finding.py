"""What was found when one case was tried on one kind of base."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

Precision = Literal["fp32", "bf16", "nf4"]
Verdict = Literal["works", "refused", "late", "wrong", "crashed"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "nf4")
INSPECT, ENGINE = "inspect", "engine"
# Whole jobs: an initialization for every kind of evidence (nothing, weights, gradients, activations, a preheat).
METHODS = ("kaiming", "pissa", "lora_one", "eva", "hrp")
MORE_METHODS = ("loram", "corda")  # in fp32 only: of kinds that are there already


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
    *(Case(method, precision) for precision in ("bf16", "nf4") for method in METHODS),
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
