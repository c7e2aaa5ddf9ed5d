"""The initializations as typed, torch-free parameters, each beside what it needs and promises.

The same classes check a request, are stored with the job, configure the run and make the catalogue.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lorainit.schema import Auto, Seed, Strict, refusal

Need = Literal["none", "weight", "gradient", "activation", "preheat"]
Offset = Literal["none", "subtract"]
Drawn = Literal["nothing", "factors", "evidence"]
ExportRank = Literal["r", "2r", "per module"]
Quantization = Literal["nf4", "int8"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What the catalogue says of a method beside its parameters.

    `offset == "subtract"` means the run trains W + s(BA - B0·A0), so its plain export has rank 2r.
    `rate_factor` multiplies the model's base learning rate. `alpha` None = the rank. `quantization`:
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
    rate_factor: float = 1.0
    alpha: float | None = None
    rslora: bool = False
    min_rank: int = 1
    even_rank: bool = False
    quantization: tuple[Quantization | None, ...] = (None, "nf4")


class InitConfig(Strict):
    """Common to all methods. `seed` null = derived from the run's seed."""

    facts: ClassVar[Method]
    seed: Seed | None = None

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
    def min_rank(self) -> int:
        """The smallest rank that these parameters work with."""
        return self.facts.min_rank

    def smaller_side(self, r: int) -> int:
        """What the smaller side of a target must have at least."""
        return r

    @property
    def drawn(self) -> Drawn:
        """What the seed shapes: what it does not, a second seed finds in the cache."""
        return "factors"

    def seed_for(self, run: int) -> int:
        """The seed of what is drawn; `run` is the run's own.

        Where nothing is meant to be drawn, sketches of an SVD are still random: always the same ones,
        so that the seed changes nothing.
        """
        if self.drawn == "nothing":
            return 0
        return run if self.seed is None else self.seed

    @property
    def rate_factor(self) -> float:
        """What the model's base learning rate is multiplied by for this start."""
        return self.facts.rate_factor


class CalibratedConfig(InitConfig):
    """Common to methods that look at data: rows of `calibration_file`, else the first of the training file."""

    calibration_file: Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00]+$")] | None = None


class Kaiming(InitConfig):
    """A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0 (Hu et al., arXiv 2106.09685; what PEFT does by default)."""

    facts = Method(
        title="Kaiming (PEFT's default)",
        description="Random A, zero B: the adapter starts as exactly nothing.",
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


class PiSSA(InitConfig):
    """Top-r singular directions of W (Meng et al., arXiv 2404.02948).

    `niter` limits the power iterations of a randomized SVD, which ends early when it is exact; null = the full SVD.
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
    def drawn(self) -> Drawn:
        """The top directions are what they are."""
        return "nothing"


class MiLoRA(InitConfig):
    """Bottom-r singular directions of W, by the full SVD (Wang et al., arXiv 2406.09044)."""

    facts = Method(
        title="MiLoRA",
        description="Starts from the smallest singular directions, leaving the principal ones alone.",
        paper="MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning",
        arxiv="2406.09044",
        needs="weight",
        offset="subtract",
    )
    method: Literal["milora"]

    @property
    def drawn(self) -> Drawn:
        """The full SVD draws nothing."""
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
        rate_factor=0.2,
    )
    method: Literal["olora"]
    scale_aware: bool = True

    @property
    def drawn(self) -> Drawn:
        """A QR decomposition draws nothing."""
        return "nothing"


class LoRAM(InitConfig):
    """Fixed sine bases at the magnitude of W (Zhang et al., arXiv 2507.06558, NeurIPS 2025).

    `magnitude`: "variance" (the authors' code) or "second_moment" (the paper's text).
    `scale_aware`: size the product s·B·A rather than B·A.
    The rest are the paper's ablations. `basis`: random instead of sine. `rank_factor`: the gain
    log(r) or log(r/2), over log min(m, n). `tracking`: take the magnitude of another method's B·A.
    """

    facts = Method(
        title="LoRAM",
        description="Orthonormal sine bases at the magnitude of each weight: no SVD, no data, no chance.",
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
        """The other method has fixed the magnitude: a gain or a scale on top would be ignored."""
        for field, given in (("rank_factor", self.rank_factor != "log_r"), ("scale_aware", self.scale_aware)):
            if self.tracking and given:
                raise refusal(field, f"{field} does not combine with tracking: {self.tracking} sets the magnitude.")
        return self

    @property
    def min_rank(self) -> int:
        """Where the logarithm is positive: at 0 both factors and their gradients are zero for ever."""
        return 3 if self.rank_factor == "log_half_r" else 2

    @property
    def drawn(self) -> Drawn:
        """The sine bases are fixed."""
        return "nothing" if self.basis == "dst" else "factors"


class LoRAGA(CalibratedConfig):
    """Shifted singular vectors of the mean gradient (Wang, Yu, Li, arXiv 2407.05000; the authors' scaling).

    `norm_clip`: no entry of the offset s·B·A may exceed the largest of W.
    """

    facts = Method(
        title="LoRA-GA",
        description="Orthonormal directions of the full gradient: the first step is the best rank-2r step.",
        paper="LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
        arxiv="2407.05000",
        needs="gradient",
        offset="subtract",
        rate_factor=0.1,
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
    def drawn(self) -> Drawn:
        """Which of the top directions go where may be left to chance; what they are is not."""
        return "factors" if self.direction == "random" else "nothing"

    def smaller_side(self, r: int) -> int:
        """A and B take r directions of the gradient each."""
        return 2 * r


class LoRAOne(CalibratedConfig):
    """One-step full gradient (Zhang, Liu, Chen, arXiv 2502.01235, ICML 2025).

    `version` "v3" is the camera-ready: the model starts one rank-r gradient step ahead, on purpose.
    "v1" is the first version: orthonormal vectors, subtracted. `gamma` null = 128 (v3) or 64 (v1);
    "auto" (v3 only, our extension) = a line search on the calibration rows. `niter` limits the power
    iterations of a randomized SVD, which ends early when it is exact; null = the full SVD.
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
    method: Literal["lora_one"]
    version: Literal["v3", "v1"] = "v3"
    samples: Annotated[int, Field(ge=1, le=4096)] = 8
    gamma: Annotated[float, Field(gt=0)] | Auto | None = None
    niter: Annotated[int, Field(ge=0, le=64)] | None = 16

    @property
    def offset(self) -> Offset:
        """v1 subtracts its start."""
        return "subtract" if self.version == "v1" else "none"

    @property
    def function_preserving(self) -> bool:
        """v3 is displaced by one step."""
        return self.version == "v1"

    @property
    def drawn(self) -> Drawn:
        """The gradient's top directions are what they are."""
        return "nothing"

    @property
    def rate_factor(self) -> float:
        """The authors train v1 at 2e-5 and v3 at 2e-4."""
        return 0.1 if self.version == "v1" else self.facts.rate_factor

    @model_validator(mode="after")
    def refuse_a_search_without_a_step(self) -> "LoRAOne":
        """v1 starts where the base model is: there is no step whose loss could be compared."""
        if self.version == "v1" and self.gamma == "auto":
            raise refusal("gamma", 'gamma "auto" does not combine with version v1, which takes no step.')
        return self


class HRP(InitConfig):
    """High-Rank Preheating (Chen et al., arXiv 2502.07739), rebuilt without the paper's body or code.

    `c` scales the orthonormal rows of A; 1/sqrt(3) matches Kaiming's norm. `preheat_learning_rate` "auto" =
    the run's peak rate. Other readings of the paper: `side` "left" starts B, not A, from the left singular
    vectors; `b_init` "carry" keeps the preheated product's leading part and so starts displaced; `main_data`
    "continue" gives the main run the rows after the preheat's. `complete` fills directions that the preheat
    did not find with random ones instead of refusing.
    """

    facts = Method(
        title="High-Rank Preheating",
        description="Trains a high-rank LoRA for a few steps and starts the main run from its leading directions.",
        paper="HRP: High-Rank Preheating for Superior LoRA Initialization",
        arxiv="2502.07739",
        needs="preheat",
        maturity="experimental",
    )
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
        """The preheated adapter is the larger one."""
        return r if self.preheat_rank == "auto" else max(r, self.preheat_rank)

    @property
    def function_preserving(self) -> bool:
        """A product that is carried over is not zero."""
        return self.b_init == "zero"

    @model_validator(mode="after")
    def carrying_needs_the_right_side(self) -> "HRP":
        """With the left side it is A that starts at zero."""
        if self.b_init == "carry" and self.side == "left":
            raise refusal("b_init", 'b_init "carry" does not combine with side "left", which starts A at zero.')
        return self

    @property
    def drawn(self) -> Drawn:
        """The preheat trains, in the run's own order of rows."""
        return "evidence"


class EVA(CalibratedConfig):
    """Principal directions of each layer's inputs, ranks spread by explained variance (Paischer et al., 2410.07170).

    `use_label_mask`: look at the inputs of trained tokens only, as PEFT does; false = of all but padding.
    """

    facts = Method(
        title="EVA",
        description="Starts A in the principal directions of each layer's inputs and spreads the ranks by need.",
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

    @property
    def export_rank(self) -> ExportRank:
        """Spread over the layers by need."""
        return "per module"

    @property
    def drawn(self) -> Drawn:
        """The principal directions are what they are."""
        return "nothing"


class CorDA(CalibratedConfig):
    """Singular directions of W weighted by the inputs' second moment (Yang et al., arXiv 2406.05223)."""

    facts = Method(
        title="CorDA",
        description="Decomposes each weight as its inputs see it: learn the data's directions, or protect them.",
        paper="CorDA: Context-Oriented Decomposition Adaptation of Large Language Models",
        arxiv="2406.05223",
        needs="activation",
        offset="subtract",
    )
    method: Literal["corda"]
    mode: Literal["ipm", "kpm"] = "ipm"
    samples: Annotated[int, Field(ge=1, le=4096)] = 256

    @property
    def drawn(self) -> Drawn:
        """Second moments and full decompositions draw nothing."""
        return "nothing"


class LoftQ(InitConfig):
    """Corrects what NF4 lost of each weight (Li et al., arXiv 2310.08659), in one iteration.

    More iterations would quantize something else than the base model: the adapter would fit no NF4
    base but its own. `bits` 8 waits for int8 bases.
    """

    facts = Method(
        title="LoftQ",
        description="Starts as the best rank-r correction of what four bits lost of each weight.",
        paper="LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models",
        arxiv="2310.08659",
        needs="weight",
        function_preserving=False,
        quantization=("nf4",),
    )
    method: Literal["loftq"]
    bits: Literal[4, 8] = 4
    iterations: Annotated[int, Field(ge=1, le=10)] = 1

    @property
    def drawn(self) -> Drawn:
        """The best correction is what it is."""
        return "nothing"

    @model_validator(mode="after")
    def refuse_another_base(self) -> "LoftQ":
        """The base must stay the one that anybody gets by loading the untouched model in NF4."""
        if self.bits != 4:
            raise refusal("bits", f"bits {self.bits} is planned: this release has NF4 bases.", code="not_supported")
        if self.iterations != 1:
            why = "after the first one the base is no longer the untouched model in NF4, which nobody else can load"
            raise refusal("iterations", f"iterations {self.iterations} does not combine with a plain download: {why}.")
        return self


class Automatic(Strict):
    """Let the server choose; the choice and its reason are reported."""

    method: Literal["auto"] = "auto"


AnyInit = (
    Kaiming | Gaussian | Orthogonal | PiSSA | MiLoRA | OLoRA | LoRAM | LoRAGA | LoRAOne | HRP | EVA | CorDA | LoftQ
)
Init = Annotated[AnyInit | Automatic, Field(discriminator="method")]

INITS: dict[str, type[AnyInit]] = {
    "kaiming": Kaiming,
    "gaussian": Gaussian,
    "orthogonal": Orthogonal,
    "pissa": PiSSA,
    "milora": MiLoRA,
    "olora": OLoRA,
    "loram": LoRAM,
    "lora_ga": LoRAGA,
    "lora_one": LoRAOne,
    "hrp": HRP,
    "eva": EVA,
    "corda": CorDA,
    "loftq": LoftQ,
}
