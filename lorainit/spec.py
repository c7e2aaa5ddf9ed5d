"""The one schema: what a run is, in torch-free pydantic models.

The same classes are the request's `lora` part, the stored job, the worker's input, the command
line's input and the method catalogue. Unknown fields are refused, nothing is coerced, and `null`
means "absent" wherever null is not itself a value. This module never imports torch and knows
nothing of the service.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Need = Literal["none", "weight", "gradient", "activation", "preheat"]
Auto = Literal["auto"]
Seed = Annotated[int, Field(ge=0, le=2_147_483_647)]


class Strict(BaseModel):
    """Frozen, strict, closed: the base of every model a caller can fill in."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def null_means_absent(cls, data: Any) -> Any:
        """Drop explicit nulls of fields for which null is no value (clients send them freely)."""
        if not isinstance(data, dict):
            return data
        return {
            key: value
            for key, value in data.items()
            if value is not None or key not in cls.model_fields or cls._takes_null(key)
        }

    @classmethod
    def _takes_null(cls, name: str) -> bool:
        return type(None) in get_args(cls.model_fields[name].annotation)


# --- methods -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Method:
    """What the catalogue says of a method beside its parameters.

    `offset == "subtract"` means the run trains W + s(BA - B0·A0), so its plain export has rank 2r.
    `rate_factor` multiplies the model's base learning rate.
    """

    title: str
    description: str
    paper: str
    arxiv: str | None
    needs: Need
    offset: Literal["none", "subtract"] = "none"
    function_preserving: bool = True
    maturity: Literal["stable", "experimental"] = "stable"
    rate_factor: float = 1.0
    min_rank: int = 1
    even_rank: bool = False


class InitConfig(Strict):
    """Common to all methods. `seed` null = derived from the run's seed."""

    facts: ClassVar[Method]
    seed: Seed | None = None


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
    """B·A = 0 with both factors non-zero (blog "Rethink LoRA initialisation"; PEFT's `orthogonal`)."""

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


class PiSSA(InitConfig):
    """Top-r singular directions of W (Meng et al., arXiv 2404.02948).

    `niter` power iterations of a randomized SVD with q = 2r; null = the full SVD.
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


class LoRAM(InitConfig):
    """Fixed sine bases at the magnitude of W (Zhang et al., arXiv 2507.06558, NeurIPS 2025).

    `magnitude`: "variance" (the authors' code) or "second_moment" (the paper's text).
    `scale_aware`: size the product s·B·A rather than B·A.
    `basis`: "dst" is the method; the others are the paper's ablations.
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


class Automatic(Strict):
    """Let the server choose; the choice and its reason are reported."""

    method: Literal["auto"] = "auto"


AnyInit = Kaiming | Gaussian | Orthogonal | PiSSA | MiLoRA | OLoRA | LoRAM
Init = Annotated[AnyInit | Automatic, Field(discriminator="method")]

INITS: dict[str, type[AnyInit]] = {
    "kaiming": Kaiming,
    "gaussian": Gaussian,
    "orthogonal": Orthogonal,
    "pissa": PiSSA,
    "milora": MiLoRA,
    "olora": OLoRA,
    "loram": LoRAM,
}


# --- the adapter -------------------------------------------------------------------------------


class Lora(Strict):
    """The adapter: its shape, its initialization and what it is attached to.

    `alpha` and `use_rslora` "auto" take the method's recommended value; `init` "auto" lets us
    choose. `Lora.resolved()` replaces every "auto" and says why.
    """

    init: Init = Kaiming(method="kaiming")
    r: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Annotated[float, Field(gt=0, le=4096)] | Auto = "auto"
    use_rslora: bool | Auto = "auto"
    use_dora: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: (
        Literal["all-linear", "attention", "mlp"]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(min_length=1, max_length=64)]
    ) = "all-linear"
    quantization: Literal["nf4", "int8"] | None = None

    @model_validator(mode="before")
    @classmethod
    def a_string_names_a_method(cls, data: Any) -> Any:
        """`"init": "pissa"` is short for `"init": {"method": "pissa"}`."""
        if isinstance(data, dict) and isinstance(data.get("init"), str):
            return {**data, "init": {"method": data["init"]}}
        return data

    @model_validator(mode="after")
    def refuse_what_does_not_combine(self) -> "Lora":
        """Raise `unsupported_combination` with the field at fault, never pick something else."""
        if isinstance(self.init, Automatic):
            return self
        name, facts = self.init.method, self.init.facts
        if self.r < facts.min_rank:
            raise _refusal("r", f"{name} needs a rank of at least {facts.min_rank} (got {self.r}).")
        if facts.even_rank and self.r % 2:
            raise _refusal("r", f"{name} needs an even rank (got {self.r}).")
        if self.dropout and facts.offset == "subtract":
            why = "its starting product is not zero, and a dropped branch would no longer cancel the offset"
            raise _refusal("dropout", f"dropout does not combine with {name}: {why}.")
        if self.use_dora and facts.offset == "subtract":
            why = "the plain export of a base-changing method would lose DoRA's magnitudes"
            raise _refusal("use_dora", f"use_dora does not combine with {name}: {why}.")
        if self.use_dora and self.quantization:
            raise _refusal("use_dora", "use_dora does not combine with a quantized base.")
        return self

    def resolved(self) -> tuple["Lora", list["Choice"]]:
        """Every "auto" replaced, and one `Choice` (param, value, reason) for each of them."""
        update, choices = dict[str, Any](), list[Choice]()
        if isinstance(self.init, Automatic):
            update["init"], reason = self._auto_init()
            choices.append(Choice(param="lora.init", value=update["init"].method, reason=reason))
        if self.alpha == "auto":
            update["alpha"] = float(self.r)
            choices.append(Choice(param="lora.alpha", value=float(self.r), reason="recommended: alpha = r"))
        if self.use_rslora == "auto":
            update["use_rslora"] = False
            choices.append(Choice(param="lora.use_rslora", value=False, reason="recommended: scale = alpha/r"))
        return self.model_copy(update=update), choices

    def _auto_init(self) -> tuple[AnyInit, str]:
        if self.r >= LoRAM.facts.min_rank and not self.dropout and not self.use_dora:
            return LoRAM(method="loram"), "needs no data and no SVD, and starts at the weights' own magnitude"
        return Kaiming(method="kaiming"), "the requested rank, dropout or DoRA rules out a non-zero start"

    @property
    def method(self) -> AnyInit:
        """The initialization of a resolved adapter."""
        if isinstance(self.init, Automatic):
            raise ValueError("lora.init is still 'auto': call resolved() first")
        return self.init

    @property
    def scaling(self) -> float:
        """The multiplier s of the adapter: alpha/r, or alpha/sqrt(r) with rsLoRA."""
        if self.alpha == "auto" or self.use_rslora == "auto":
            raise ValueError("lora.alpha or lora.use_rslora is still 'auto': call resolved() first")
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)


class Choice(Strict):
    """One value the server chose for the caller, and why."""

    param: str
    value: float | int | bool | str
    reason: str


def _refusal(param: str, message: str) -> PydanticCustomError:
    # The message is passed as a value, so braces in it are never taken for placeholders.
    return PydanticCustomError("unsupported_combination", "{message}", {"message": message, "param": param})


# --- training ----------------------------------------------------------------------------------


class AdamW(Strict):
    """Decoupled weight decay Adam, betas (0.9, 0.999), eps 1e-8 (Loshchilov & Hutter, 1711.05101)."""

    name: Literal["adamw"] = "adamw"


class Hyperparameters(Strict):
    """`method.supervised.hyperparameters`: OpenAI's three, and ours.

    `batch_size` is the effective batch in rows. Intervals are in optimizer steps. `learning_rate`
    is the absolute peak; `learning_rate_multiplier` multiplies the base rate of model and method.
    """

    n_epochs: Annotated[int, Field(ge=1, le=50)] | Auto = "auto"
    batch_size: Annotated[int, Field(ge=1, le=256)] | Auto = "auto"
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1e9)] | Auto = "auto"
    learning_rate: Annotated[float, Field(ge=1e-8, le=1)] | None = None
    optimizer: AdamW = AdamW()
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, le=0.5)] = 0.03
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | Auto = "auto"
    max_steps: Annotated[int, Field(ge=1)] | None = None
    eval_interval: Annotated[int, Field(ge=1)] | Auto = "auto"
    checkpoint_interval: Annotated[int, Field(ge=1)] | Auto = "auto"


class Target(Strict):
    """One kind of linear layer of a base: its name's suffix, its place and its matrix, out x in.

    `count` = how many layers have it; `group` is what `target_modules` can ask for.
    """

    name: str
    group: Literal["attention", "mlp", "other"]
    out_features: Annotated[int, Field(ge=1)]
    in_features: Annotated[int, Field(ge=1)]
    count: Annotated[int, Field(ge=1)]


class ModelFacts(Strict):
    """What a request can be checked against without opening the model (`lorainit.inspect`)."""

    root: str
    max_length: Annotated[int, Field(ge=8)]
    chat: bool
    base_sha256: str | None = None
    targets: list[Target]


class BaseModelRef(Strict):
    """Where the base model is.

    `source`: a local folder, a local `.gguf` file, `package:<python package>/<file>` or
    `hub:<owner>/<name>[@<revision>]`. `root` is the public name written into the adapter.
    """

    id: str
    source: str
    root: str
    max_length: Annotated[int, Field(ge=8)] = 2048
    base_learning_rate: Annotated[float, Field(gt=0)] = 2e-4


class Data(Strict):
    """Local JSONL files. `on_row_error` "skip" trains on the good rows and reports the others."""

    training: str
    validation: str | None = None
    on_row_error: Literal["fail", "skip"] = "fail"


class RunSpec(Strict):
    """Everything a run needs; the same spec on the same machine gives the same adapter."""

    model: BaseModelRef
    data: Data
    lora: Lora = Lora()
    training: Hyperparameters = Hyperparameters()
    seed: Seed = 0
    deterministic: bool = True
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    cache: str | None = None
    resume_from: str | None = None
