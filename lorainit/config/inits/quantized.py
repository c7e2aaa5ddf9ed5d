"""Initializations that use the base weight and the error that quantization made in it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lorainit.config.inits.base import InitConfig, Method, Randomness
from lorainit.config.schema import refusal


class LoftQ(InitConfig):
    """Corrects the error of NF4 in each weight (Li et al., arXiv 2310.08659), in one iteration.

    More iterations are refused because they would quantize W minus the adapter instead of W. The adapter would then fit
    only a base that nobody else can load. `bits` 8 is planned together with int8 bases.
    """

    facts = Method(
        title="LoftQ",
        description="Starts as the best rank-r correction of the error that four bits make in each weight.",
        paper="LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models",
        arxiv="2310.08659",
        needs="weight",
        function_preserving=False,
        quantization=("nf4",),
    )
    remedy = "A larger r corrects more of the quantization; kaiming starts as the NF4 base itself."
    refuses_experts = "NF4 leaves experts in the run's own precision, so there is nothing for LoftQ to correct"
    method: Literal["loftq"]
    bits: Literal[4, 8] = 4
    iterations: Annotated[int, Field(ge=1, le=10)] = 1

    @property
    def randomness(self) -> Randomness:
        """The best correction is computed, so no random numbers shape it."""
        return "nothing"

    @model_validator(mode="after")
    def refuse_another_base(self) -> "LoftQ":
        """Refuse parameters whose base is not the one that everybody gets by loading the model in NF4."""
        if self.bits != 4:
            raise refusal("bits", f"bits {self.bits} is planned: this release has NF4 bases.", code="not_supported")
        if self.iterations != 1:
            why = "after the first one the base is no longer the untouched model in NF4, which nobody else can load"
            raise refusal("iterations", f"iterations {self.iterations} does not combine with a plain download: {why}.")
        return self
