"""What the parameters of all initializations have in common, and the facts that the catalogue shows of each."""

# ruff: noqa: ARG002 - every initialization has the same signatures, so some arguments are unused

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lorainit.config.schema import Seed, Strict

Need = Literal["none", "weight", "gradient", "activation", "preheat"]
Offset = Literal["none", "subtract"]
Randomness = Literal["nothing", "factors", "evidence"]
ExportRank = Literal["r", "2r", "per module"]
ExportRanks = Literal["padded", "pattern"]
Quantization = Literal["nf4", "int8"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What the catalogue says of a method beside its parameters.

    `offset == "subtract"` means that the run trains W + s(BA - B0·A0), so its plain export has rank 2r. `alpha` is the
    recommended one, None = the rank. `quantization`: the bases that the method works on, the recommended one first;
    None in it = the full-precision base.
    """

    title: str
    description: str
    paper: str
    arxiv: str | None
    needs: Need
    offset: Offset = "none"
    function_preserving: bool = True
    maturity: Literal["stable", "experimental"] = "stable"
    alpha: float | None = None
    rslora: bool = False
    min_rank: int = 1
    even_rank: bool = False
    quantization: tuple[Quantization | None, ...] = (None, "nf4")


class InitConfig(Strict):
    """Common to all methods. `seed` null = the run's seed.

    A method overrides the members below where it differs. The code that runs methods asks these members and never
    tests for a method's name, so that a new method needs no change there. `remedy`: advice for the case that a start
    which changes the model made its loss worse. `refuses_experts`: why the method cannot start the matrices of
    experts; empty if it can.
    """

    facts: ClassVar[Method]
    remedy: ClassVar[str] = ""
    refuses_experts: ClassVar[str] = ""
    seed: Seed | None = None
    if TYPE_CHECKING:  # a field of each initialization, with its name as the only value

        @property
        def method(self) -> str: ...  # noqa: D102

    @property
    def offset(self) -> Offset:
        """Whether the run trains on W ("none") or on W - s·B0·A0 ("subtract"); in some methods a parameter decides."""
        return self.facts.offset

    @property
    def function_preserving(self) -> bool:
        """Whether the adapted model starts as the base model; False = the method changes it on purpose."""
        return self.facts.function_preserving

    @property
    def export_rank(self) -> ExportRank:
        """The rank of the download: 2r with an offset, because the subtracted start is written as r more ranks."""
        return "2r" if self.offset == "subtract" else "r"

    @property
    def takes_part_of_weight(self) -> bool:
        """Whether B·A starts as a part of W. If so, the report says how large that part is."""
        return self.facts.needs in ("weight", "activation") and self.offset == "subtract"

    @property
    def supports_dora(self) -> bool:
        """Whether DoRA can be trained: it needs a full-precision base, and a rank-2r export has no magnitudes."""
        return self.offset == "none" and None in self.facts.quantization

    @property
    def written_ranks(self) -> ExportRanks:
        """How the download holds layers of different rank."""
        return "padded"

    @property
    def min_rank(self) -> int:
        """The smallest rank that these parameters work with."""
        return self.facts.min_rank

    def smaller_side(self, r: int) -> int:
        """The least that the smaller side of a target matrix must be."""
        return r

    @property
    def randomness(self) -> Randomness:
        """Which results the seed changes. Results that it does not change are cached for all seeds."""
        return "factors"

    def seed_for(self, run: int) -> int:
        """The seed for this initialization's random numbers; `run` is the run's own seed.

        A method without randomness may still use a randomized SVD. That one always gets seed 0, so that the run's
        seed does not change its result.
        """
        if self.randomness == "nothing":
            return 0
        return run if self.seed is None else self.seed

    def warnings(self, *, r: int, scale: float, widest: int) -> list[str]:
        """Sentences that warn a user of this start; `widest`: the number of inputs of the widest layer."""
        return []

    def batches_used(self, report: Mapping[str, Any]) -> int:
        """How many batches the initialization has used up, so that training begins after them.

        `report` is `job.init_report`.
        """
        return 0

    @property
    def rates(self) -> str:
        """The row of `lorainit.config.rates.RATES` that this start takes its default learning rate from."""
        return self.method


class CalibratedConfig(InitConfig):
    """Common to methods that use data: rows of `calibration_file`, or else the first rows of the training file."""

    calibration_file: Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00]+$")] | None = None
