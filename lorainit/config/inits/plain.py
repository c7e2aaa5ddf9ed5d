"""Initializations that need neither weights nor data, only the shape of the layer."""

# ruff: noqa: ARG002 - every initialization has the same signatures, so some arguments are unused

from typing import Annotated, Literal

from pydantic import Field

from lorainit.config.inits.base import InitConfig, Method


class Kaiming(InitConfig):
    """A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0 (Hu et al., arXiv 2106.09685; what PEFT does by default)."""

    facts = Method(
        title="Kaiming (PEFT's default)",
        description="Random A, zero B, so the adapter changes nothing at the start.",
        paper="LoRA: Low-Rank Adaptation of Large Language Models",
        arxiv="2106.09685",
        needs="none",
    )
    method: Literal["kaiming"]


class Gaussian(InitConfig):
    """A ~ N(0, 1/r^2), B = 0 (PEFT's `gaussian`; no paper)."""

    facts = Method(
        title="Gaussian",
        description="Random normal A whose size depends on the rank, zero B.",
        paper="",
        arxiv=None,
        needs="none",
    )
    method: Literal["gaussian"]

    def warnings(self, *, r: int, scale: float, widest: int) -> list[str]:
        """Warn, because the size of A depends on the layer's width here, and the best learning rate with it."""
        return [
            f"The rows of A have norm sqrt(in)/r, up to {widest**0.5 / r:.2f}, against 0.58 for kaiming whatever the"
            " layer: the best learning rate of gaussian differs and depends on r."
        ]


class Orthogonal(InitConfig):
    """B·A = 0 with both factors non-zero (blog "Rethink LoRA initialisation"; PEFT's `orthogonal`).

    Both factors are divided by `divisor`.
    """

    facts = Method(
        title="Orthogonal",
        description="Both factors start non-zero in orthogonal subspaces, so their product is zero.",
        paper="",
        arxiv=None,
        needs="none",
        even_rank=True,
        min_rank=2,
    )
    method: Literal["orthogonal"]
    divisor: Annotated[float, Field(gt=0)] = 10.0
