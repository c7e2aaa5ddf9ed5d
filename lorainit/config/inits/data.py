"""Initializations that use rows of data: for gradients, for the inputs of the layers, or for a short training."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lorainit.config.inits.base import CalibratedConfig, ExportRank, ExportRanks, InitConfig, Method, Offset, Randomness
from lorainit.config.schema import Auto, refusal


class LoRAGA(CalibratedConfig):
    """Shifted singular vectors of the mean gradient (Wang, Yu, Li, arXiv 2407.05000; the authors' scaling).

    `norm_clip`: shrink the offset s·B·A so that none of its entries is larger than the largest entry of W.
    """

    facts = Method(
        title="LoRA-GA",
        description="Orthonormal directions of the full gradient: the first step is the best rank-2r step.",
        paper="LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
        arxiv="2407.05000",
        needs="gradient",
        offset="subtract",
        alpha=16.0,
        rslora=True,
    )
    method: Literal["lora_ga"]
    samples: Annotated[int, Field(ge=1, le=4096)] = 128
    gamma: Annotated[float, Field(gt=0)] = 16.0
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale: Literal["stable", "unit", "gd", "weight_svd"] = "stable"
    norm_clip: bool = False

    @property
    def randomness(self) -> Randomness:
        """The top directions are computed. Only `direction` "random" draws which of them go to A and which to B."""
        return "factors" if self.direction == "random" else "nothing"

    def smaller_side(self, r: int) -> int:
        """A and B take r different directions of the gradient each, so 2r are needed."""
        return 2 * r


class LoRAOne(CalibratedConfig):
    """One-step full gradient (Zhang, Liu, Chen, arXiv 2502.01235, ICML 2025).

    `version` "v3" is the paper's final version: the model starts one rank-r gradient step ahead, on purpose.
    "v1" is its first version: orthonormal vectors, which are subtracted again. `gamma` null = 128 (v3) or 64 (v1);
    "auto" (v3 only, our extension) = a line search on the calibration rows. `niter` limits the power
    iterations of a randomized SVD, which stops earlier once it is exact; null = the full SVD.
    """

    facts = Method(
        title="LoRA-One",
        description="Starts one full-gradient step ahead, in the gradient's own leading directions.",
        paper="LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models",
        arxiv="2502.01235",
        needs="gradient",
        function_preserving=False,
        alpha=16.0,
        rslora=True,
    )
    remedy = 'Use gamma "auto", or a larger gamma (the step shrinks with it).'
    method: Literal["lora_one"]
    version: Literal["v3", "v1"] = "v3"
    samples: Annotated[int, Field(ge=1, le=4096)] = 8
    gamma: Annotated[float, Field(gt=0)] | Auto | None = None
    niter: Annotated[int, Field(ge=0, le=64)] | None = 16

    @property
    def offset(self) -> Offset:
        """v1 subtracts its start, v3 does not."""
        return "subtract" if self.version == "v1" else "none"

    @property
    def function_preserving(self) -> bool:
        """False for v3, because its start is one gradient step away from the base model."""
        return self.version == "v1"

    @property
    def randomness(self) -> Randomness:
        """The gradient's top directions are computed, so no random numbers shape them."""
        return "nothing"

    @property
    def rates(self) -> str:
        """v1 has a row of its own, because it starts with large factors and needs a smaller rate."""
        return "lora_one v1" if self.version == "v1" else self.method

    @model_validator(mode="after")
    def refuse_a_search_without_a_step(self) -> "LoRAOne":
        """Refuse gamma "auto" with v1, because v1 starts as the base model and has no step whose loss could be
        compared."""
        if self.version == "v1" and self.gamma == "auto":
            raise refusal("gamma", 'gamma "auto" does not combine with version v1, which takes no step.')
        return self


class HRP(InitConfig):
    """High-Rank Preheating (Chen et al., arXiv 2502.07739), rebuilt from the abstracts: neither full text nor code was
    available.

    `c` scales the orthonormal rows of A; 1/sqrt(3) matches Kaiming's norm. `preheat_learning_rate` "auto" =
    the run's peak rate. Other readings of the paper are options: `side` "left" starts B instead of A, from the left
    singular vectors; `b_init` "carry" keeps the leading part of the preheated product, so the model does not start as
    the base; `main_data` "continue" gives the main run the rows that follow those of the preheat. `complete` replaces
    directions that the preheat did not find by random ones; without it such a run is refused.
    """

    facts = Method(
        title="High-Rank Preheating",
        description="Trains a high-rank LoRA for a few steps and starts the main run from its leading directions.",
        paper="HRP: High-Rank Preheating for Superior LoRA Initialization",
        arxiv="2502.07739",
        needs="preheat",
        maturity="experimental",
    )
    remedy = 'Use a lower preheat_learning_rate, or b_init "zero".'
    method: Literal["hrp"]
    preheat_rank: Annotated[int, Field(ge=2)] | Auto = "auto"
    preheat_steps: Annotated[int, Field(ge=1)] | Auto = "auto"
    preheat_mode: Literal["classic", "freeze_a"] = "classic"
    preheat_a_law: Literal["orthonormal", "kaiming"] = "orthonormal"
    preheat_learning_rate: Annotated[float, Field(ge=1e-8, le=1)] | Auto = "auto"
    c: Annotated[float, Field(gt=0)] = 1.0
    side: Literal["right", "left"] = "right"
    b_init: Literal["zero", "carry"] = "zero"
    complete: Literal["random_orthonormal"] | None = None
    main_data: Literal["rewind", "continue"] = "rewind"

    def smaller_side(self, r: int) -> int:
        """The rank of the preheated adapter, because that one is larger than the run's own."""
        return r if self.preheat_rank == "auto" else max(r, self.preheat_rank)

    @property
    def function_preserving(self) -> bool:
        """False if the preheated product is carried over, because it is not zero."""
        return self.b_init == "zero"

    @model_validator(mode="after")
    def carrying_needs_the_right_side(self) -> "HRP":
        """Refuse b_init "carry" with side "left", because then A starts at zero and B·A could not be carried over."""
        if self.b_init == "carry" and self.side == "left":
            raise refusal("b_init", 'b_init "carry" does not combine with side "left", which starts A at zero.')
        return self

    def batches_used(self, report: Mapping[str, Any]) -> int:
        """The batches of the preheat if the main run continues after them, else 0."""
        return int(report["preheat"]["steps"]) if self.main_data == "continue" else 0

    @property
    def randomness(self) -> Randomness:
        """The preheat is a training on rows in the run's order, so the seed changes what it finds."""
        return "evidence"


class EVA(CalibratedConfig):
    """Principal directions of each layer's inputs, ranks spread by explained variance (Paischer et al., 2410.07170).

    `use_label_mask`: use the inputs of trained tokens only, as PEFT does; false = of all tokens but padding.
    `export_ranks`: "padded" = the download has zeros up to the largest rank, so that every LoRA loader can read it;
    "pattern" = PEFT's rank and alpha patterns, a smaller file that few loaders other than PEFT can read.
    """

    facts = Method(
        title="EVA",
        description="Starts A in the principal directions of each layer's inputs; ranks follow explained variance.",
        paper="One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
        arxiv="2410.07170",
        needs="activation",
    )
    method: Literal["eva"]
    samples: Annotated[int, Field(ge=1, le=4096)] = 256
    rho: Annotated[float, Field(ge=1, le=10)] = 2.0
    tau: Annotated[float, Field(ge=0, le=1)] = 0.99
    use_label_mask: bool = True
    whiten: bool = False
    export_ranks: ExportRanks = "padded"

    @property
    def written_ranks(self) -> ExportRanks:
        """As `export_ranks` asks for."""
        return self.export_ranks

    @property
    def export_rank(self) -> ExportRank:
        """Each layer has a rank of its own, because ranks are spread by explained variance."""
        return "per module"

    @property
    def randomness(self) -> Randomness:
        """The principal directions are computed, so no random numbers shape them."""
        return "nothing"


class CorDA(CalibratedConfig):
    """Singular directions of W weighted by the inputs' second moment (Yang et al., arXiv 2406.05223).

    `balance` "equal": each row of inputs is divided by its largest |entry|, and A and B start with the same norm.
    "authors", as their code does it: each row is divided by |its largest entry|, and the sizes of A and B depend on the
    size of the second moment.
    """

    facts = Method(
        title="CorDA",
        description="Weights the SVD of W by the layer's inputs, to learn the data's directions or to protect them.",
        paper="CorDA: Context-Oriented Decomposition Adaptation of Large Language Models",
        arxiv="2406.05223",
        needs="activation",
        offset="subtract",
    )
    method: Literal["corda"]
    mode: Literal["ipm", "kpm"] = "ipm"
    balance: Literal["equal", "authors"] = "equal"
    samples: Annotated[int, Field(ge=1, le=4096)] = 256

    @property
    def randomness(self) -> Randomness:
        """Second moments and full decompositions use no random numbers."""
        return "nothing"
