"""What every initialization's parameters have in common, and the facts that the catalogue tells of it."""

# ruff: noqa: ARG002 - every method is asked alike, whether it needs all of it or not

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

    `offset == "subtract"` means the run trains W + s(BA - B0·A0), so its plain export has rank 2r.
    `alpha` None = the rank. `quantization`:
    the bases it works on, None = the full-precision one, the first one recommended.
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
    """Common to all methods. `seed` null = derived from the run's seed.

    What only one method knows of itself it says by overriding what stands here: whoever runs methods asks, and names
    none of them. `remedy`: what to try where a start that moves the model made its loss worse.
    """

    facts: ClassVar[Method]
    remedy: ClassVar[str] = ""
    seed: Seed | None = None
    if TYPE_CHECKING:  # a field of each initialization, with its name as the only value

        @property
        def method(self) -> str: ...  # noqa: D102

    @property
    def offset(self) -> Offset:
        """Whether this run trains on W or on W - s·B0·A0; some methods let a parameter decide."""
        return self.facts.offset

    @property
    def function_preserving(self) -> bool:
        """Whether the adapted model starts as the base model; False = a displaced start, on purpose."""
        return self.facts.function_preserving

    @property
    def export_rank(self) -> ExportRank:
        """The rank of the download, a plain LoRA on the untouched base."""
        return "2r" if self.offset == "subtract" else "r"

    @property
    def takes_part_of_weight(self) -> bool:
        """Whether B·A starts as a part of W; the report says how large a part."""
        return self.facts.needs in ("weight", "activation") and self.offset == "subtract"

    @property
    def written_ranks(self) -> ExportRanks:
        """How ranks that differ between layers are written into the download."""
        return "padded"

    @property
    def min_rank(self) -> int:
        """The smallest rank that these parameters work with."""
        return self.facts.min_rank

    def smaller_side(self, r: int) -> int:
        """What the smaller side of a target must have at least."""
        return r

    @property
    def randomness(self) -> Randomness:
        """What the seed shapes: what it does not, a second seed finds in the cache."""
        return "factors"

    def seed_for(self, run: int) -> int:
        """The seed of what is drawn; `run` is the run's own.

        Where nothing is meant to be drawn, sketches of an SVD are still random: always the same ones,
        so that the seed changes nothing.
        """
        if self.randomness == "nothing":
            return 0
        return run if self.seed is None else self.seed

    def warnings(self, *, r: int, scale: float, widest: int) -> list[str]:
        """What somebody who trains from this start should know; `widest`: inputs of the widest layer."""
        return []

    def batches_used(self, report: Mapping[str, Any]) -> int:
        """Batches of the run's order of rows that the start has used up; `report` is `job.init_report`."""
        return 0

    @property
    def rates(self) -> str:
        """The row of `lorainit.config.rates.RATES` that this start takes its default learning rate from."""
        return self.method


class CalibratedConfig(InitConfig):
    """Common to methods that look at data: rows of `calibration_file`, else the first of the training file."""

    calibration_file: Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00]+$")] | None = None
