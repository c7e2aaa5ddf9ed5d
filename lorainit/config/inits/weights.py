"""Initializations that use the base weight, and no data."""

# ruff: noqa: ARG002 - every initialization has the same signatures, so some arguments are unused

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lorainit.config.inits.base import InitConfig, Method, Randomness
from lorainit.config.schema import refusal


class PiSSA(InitConfig):
    """Top-r singular directions of W (Meng et al., arXiv 2404.02948).

    `niter` limits the power iterations of a randomized SVD, which stops earlier once it is exact; null = the full SVD.
    """

    facts = Method(
        title="PiSSA",
        description="Starts from the top r singular directions of each weight; the rest stays in the base.",
        paper="PiSSA: Principal Singular Values and Singular Vectors Adaptation of LLMs",
        arxiv="2404.02948",
        needs="weight",
        offset="subtract",
    )
    method: Literal["pissa"]
    niter: Annotated[int, Field(ge=0, le=64)] | None = 16

    @property
    def randomness(self) -> Randomness:
        """The top directions are computed from W, so no random numbers shape them."""
        return "nothing"


class MiLoRA(InitConfig):
    """Bottom-r singular directions of W, by the full SVD (Wang et al., arXiv 2406.09044)."""

    facts = Method(
        title="MiLoRA",
        description="Starts from the smallest singular directions and does not touch the principal ones.",
        paper="MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning",
        arxiv="2406.09044",
        needs="weight",
        offset="subtract",
    )
    method: Literal["milora"]

    @property
    def randomness(self) -> Randomness:
        """The full SVD uses no random numbers."""
        return "nothing"


class OLoRA(InitConfig):
    """Leading part of the QR decomposition of W (Büyükakyüz, arXiv 2406.01775).

    `scale_aware` divides A by the adapter's multiplier, so that s·B·A = Q_r·R_r for every s.
    """

    facts = Method(
        title="OLoRA",
        description="Starts from the leading part of each weight's QR decomposition (orthonormal B).",
        paper="OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
        arxiv="2406.01775",
        needs="weight",
        offset="subtract",
    )
    method: Literal["olora"]
    scale_aware: bool = True

    @property
    def randomness(self) -> Randomness:
        """A QR decomposition uses no random numbers."""
        return "nothing"


class LoRAM(InitConfig):
    """Fixed sine bases at the magnitude of W (Zhang et al., arXiv 2507.06558, NeurIPS 2025).

    `magnitude`: "variance" (the authors' code) or "second_moment" (the paper's text).
    `scale_aware`: give s·B·A the wanted magnitude, instead of B·A.
    The other parameters are the paper's ablations. `basis`: random vectors instead of sines. `rank_factor`: the gain is
    log(r) or log(r/2), divided by log min(m, n). `tracking`: take the magnitude of another method's B·A.
    """

    facts = Method(
        title="LoRAM",
        description="Fixed sine bases, sized like each weight; needs no SVD, no data and no random numbers.",
        paper="The Primacy of Magnitude in Low-Rank Adaptation",
        arxiv="2507.06558",
        needs="weight",
        offset="subtract",
        min_rank=2,
    )
    method: Literal["loram"]
    magnitude: Literal["variance", "second_moment"] = "variance"
    scale_aware: bool = False
    basis: Literal["dst", "random_orthogonal", "gaussian"] = "dst"
    rank_factor: Literal["log_r", "log_half_r"] = "log_r"
    tracking: Literal["pissa", "milora", "olora"] | None = None

    @model_validator(mode="after")
    def tracking_replaces_the_gain(self) -> "LoRAM":
        """Refuse a gain or a scale beside `tracking`, because the other method sets the magnitude and they would be
        ignored."""
        for field, given in (("rank_factor", self.rank_factor != "log_r"), ("scale_aware", self.scale_aware)):
            if self.tracking and given:
                raise refusal(field, f"{field} does not combine with tracking: {self.tracking} sets the magnitude.")
        return self

    @property
    def min_rank(self) -> int:
        """The smallest rank with a positive logarithm, because at 0 both factors and their gradients would be zero."""
        return 3 if self.rank_factor == "log_half_r" else 2

    @property
    def randomness(self) -> Randomness:
        """The sine bases are fixed; the other bases are random."""
        return "nothing" if self.basis == "dst" else "factors"

    @property
    def takes_part_of_weight(self) -> bool:
        """False, because it takes only the magnitude from the weight."""
        return False

    def warnings(self, *, r: int, scale: float, widest: int) -> list[str]:
        """Warn where the scale s would change the magnitude that LoRAM has chosen."""
        if self.scale_aware or min(abs(scale - 1), abs(scale - r**0.5)) <= 1e-6:
            return []
        return [
            f"LoRAM sizes B·A, and the scale s = {scale:g} multiplies it again: the product starts at"
            f" {scale * scale:.3g} times the intended energy. Use alpha = r (s = 1), or alpha = r with rsLoRA"
            f" (s = {r**0.5:g}), or scale_aware."
        ]
