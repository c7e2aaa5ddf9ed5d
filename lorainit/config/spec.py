"""The schema of a run, as pydantic models.

The same classes are the request's `lora` part, the stored job, the worker's input, the command line's input and the
method catalogue, so that all of them refuse the same things. Unknown fields are refused, no value is converted to
another type, and `null` means "absent" unless null is itself a value of the field. This module never imports torch.
The initializations are in `lorainit.config.inits`.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from lorainit.config import sources
from lorainit.config.inits import Automatic, Init, InitConfig, Quantization
from lorainit.config.inits.plain import Kaiming
from lorainit.config.inits.weights import LoRAM
from lorainit.config.model_facts import LeftOut
from lorainit.config.schema import Auto, Seed, Strict, refusal

# --- the adapter -------------------------------------------------------------------------------


class Lora(Strict):
    """The adapter: its shape, its initialization and what it is attached to.

    `alpha` and `use_rslora` "auto" take the method's recommended value; `init` "auto" lets us
    choose. `Lora.resolve()` replaces every "auto" and gives a reason. `left_out` is filled in by the server, which
    ignores what a request says there: the kinds of layers that `target_modules` covers but that get no LoRA, each with
    the reason (`lorainit.config.target_modules`).
    """

    init: Init = Kaiming(method="kaiming")
    r: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Annotated[float, Field(gt=0, le=4096)] | Auto = "auto"
    use_rslora: bool | Auto = "auto"
    use_dora: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: (
        Literal["all-linear", "attention", "mlp"]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=256)]],
            Field(min_length=1, max_length=512, fail_fast=True),
        ]
    ) = "all-linear"
    quantization: Quantization | None = None
    left_out: list[LeftOut] = Field(default_factory=list, max_length=512, fail_fast=True)

    @model_validator(mode="before")
    @classmethod
    def a_string_names_a_method(cls, data: Any) -> Any:
        """`"init": "pissa"` is short for `"init": {"method": "pissa"}`."""
        if isinstance(data, dict) and isinstance(data.get("init"), str):
            return {**data, "init": {"method": data["init"]}}
        return data

    @model_validator(mode="after")
    def refuse_what_does_not_combine(self) -> "Lora":
        """Raise `unsupported_combination` with the field at fault; a setting is never replaced silently."""
        if isinstance(self.init, Automatic):
            return self
        name, facts = self.init.method, self.init.facts
        if self.r < self.init.min_rank:
            raise refusal("r", f"{name} needs a rank of at least {self.init.min_rank} here (got {self.r}).")
        if facts.even_rank and self.r % 2:
            raise refusal("r", f"{name} needs an even rank (got {self.r}).")
        if self.dropout and self.init.offset == "subtract":
            why = "its starting product is not zero, and a dropped branch would no longer cancel the offset"
            raise refusal("dropout", f"dropout does not combine with {name}: {why}.")
        if self.use_dora and self.init.offset == "subtract":
            why = "the plain export of a base-changing method would lose DoRA's magnitudes"
            raise refusal("use_dora", f"use_dora does not combine with {name}: {why}.")
        if self.use_dora and self.quantization:
            raise refusal("use_dora", "use_dora does not combine with a quantized base.")
        return self

    @model_validator(mode="after")
    def refuse_a_base_that_does_not_fit(self) -> "Lora":
        """Refuse int8, which is planned, and a base that the initialization does not work on."""
        if self.quantization == "int8":
            why = "is planned and not offered by this release"
            raise refusal("quantization", f"quantization 'int8' {why}.", code="not_supported")
        if not isinstance(self.init, Automatic) and self.quantization not in self.init.facts.quantization:
            wanted = " or ".join(repr(name) for name in self.init.facts.quantization)
            raise refusal(
                "quantization", f"{self.init.method} needs quantization {wanted} (got {self.quantization!r})."
            )
        return self

    @model_validator(mode="after")
    def refuse_impossible_candidates(self) -> "Lora":
        """Refuse an initialization to choose from that does not combine with the rest."""
        if isinstance(self.init, Automatic):
            for name in self.init.candidates or ():
                try:
                    self.with_init(name)
                except ValidationError as error:
                    raise refusal("init.candidates", f"{name}: {error.errors()[0]['msg']}") from error
        return self

    def with_init(self, method: str) -> "Lora":
        """The same adapter with another initialization, at its defaults.

        Raises:
            ValidationError: it does not combine with the rest.
        """
        return Lora.model_validate({**self.model_dump(include=set(Lora.model_fields)), "init": {"method": method}})

    def resolve(self) -> tuple["Lora", list["Choice"]]:
        """Replace every "auto"; return one `Choice` (param, value, reason) for each of them."""
        update, choices = dict[str, Any](), list[Choice]()
        if isinstance(self.init, Automatic):
            update["init"], reason = self._auto_init()
            choices.append(Choice(param="lora.init", value=update["init"].method, reason=reason))
        init: InitConfig = update.get("init", self.init)
        if self.alpha == "auto":
            alpha, reason = float(self.r), "recommended: alpha = r"
            if init.facts.alpha is not None:
                alpha, reason = init.facts.alpha, f"recommended for {init.method}: alpha = {init.facts.alpha:g}"
            update["alpha"] = alpha
            choices.append(Choice(param="lora.alpha", value=alpha, reason=reason))
        if self.use_rslora == "auto":
            rslora = init.facts.rslora
            reason = f"recommended for {init.method}: scale = alpha/{'sqrt(r)' if rslora else 'r'}"
            update["use_rslora"] = rslora
            choices.append(Choice(param="lora.use_rslora", value=rslora, reason=reason))
        return self.model_copy(update=update), choices

    def _auto_init(self) -> tuple[InitConfig, str]:
        if self.r >= LoRAM.facts.min_rank and not self.dropout and not self.use_dora:
            return LoRAM(method="loram"), "needs no data and no SVD, and starts at the weights' own magnitude"
        return Kaiming(method="kaiming"), "the requested rank, dropout or DoRA rules out a non-zero start"

    @property
    def method(self) -> InitConfig:
        """The initialization of a resolved adapter."""
        if isinstance(self.init, Automatic):
            raise ValueError("lora.init is still 'auto': call resolve() first")
        return self.init

    @property
    def scaling(self) -> float:
        """The multiplier s of the adapter: alpha/r, or alpha/sqrt(r) with rsLoRA."""
        if self.alpha == "auto" or self.use_rslora == "auto":
            raise ValueError("lora.alpha or lora.use_rslora is still 'auto': call resolve() first")
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)

    def count_parameters(self, out: int, n: int) -> int:
        """How many numbers are trained on an out×n matrix: A, B and, with DoRA, one magnitude per output."""
        return self.r * (out + n) + (out if self.use_dora else 0)


class Choice(Strict):
    """One value that the server chose for the caller, and the reason."""

    param: Annotated[str, Field(max_length=255)]
    value: float | int | bool | Annotated[str, Field(max_length=4096)]
    reason: Annotated[str, Field(max_length=4096)]


# --- training ----------------------------------------------------------------------------------

LOWEST_RATE, HIGHEST_RATE = 1e-8, 1.0
Rate = Annotated[float, Field(ge=LOWEST_RATE, le=HIGHEST_RATE)]


class AdamW(Strict):
    """Adam with decoupled weight decay, betas (0.9, 0.999), eps 1e-8 (Loshchilov & Hutter, arXiv 1711.05101).

    DoRA's magnitudes are always trained by this rule, whichever optimizer is chosen, at A's rate and without decay.
    """

    name: Literal["adamw"] = "adamw"


class AdamWPreconditioned(Strict):
    """r×r preconditioners (BᵀB + damping·I)⁻¹ and (A·Aᵀ + damping·I)⁻¹.

    `update` "sequential" is LoRA-One v1's: A is updated first and B's update uses the new A, without bias correction.
    "simultaneous": both updates use the old factors, then AdamW with its bias correction.
    """

    name: Literal["adamw_preconditioned"]
    damping: Annotated[float, Field(ge=0)] = 1e-6
    update: Literal["sequential", "simultaneous"] = "sequential"


class AdamWLoRAPlus(Strict):
    """LoRA+ (Hayou et al., arXiv 2402.12354): B learns `ratio` times as fast as A."""

    name: Literal["adamw_lora_plus"]
    ratio: Annotated[float, Field(ge=1, le=10_000)] = 16.0


Optimizer = Annotated[AdamW | AdamWPreconditioned | AdamWLoRAPlus, Field(discriminator="name")]


class Hyperparameters(Strict):
    """How to train: OpenAI's three hyperparameters, and our own.

    `batch_size` is the effective batch in rows. Intervals are in optimizer steps. `learning_rate`
    is the absolute peak; `learning_rate_multiplier` multiplies the base rate of model and method.
    `precision` is the number format of the base model and of the activations; trained parameters are always
    float32. `gradient_checkpointing` computes activations again in the backward pass instead of keeping them: "auto"
    uses it only if one row does not fit otherwise. `compile` fuses the base's element-wise operations: "auto" uses it
    if the run is long enough to save more time than compiling costs. `shard_base` divides the frozen base between the
    devices of a run (`RunSpec.devices`): "auto" uses it if the base does not fit on one device.
    These four autos are resolved on the machine that runs the job, because they depend on its devices
    (`lorainit.runtime.devices`, `lorainit.train.memory`, `lorainit.model.shard`).
    """

    n_epochs: Annotated[int, Field(ge=1, le=50)] | Auto = "auto"
    batch_size: Annotated[int, Field(ge=1, le=256)] | Auto = "auto"
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1e9)] | Auto = "auto"
    learning_rate: Rate | None = None
    optimizer: Optimizer = AdamW()
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, le=0.5)] = 0.03
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | Auto = "auto"
    max_steps: Annotated[int, Field(ge=1)] | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool | Auto = "auto"
    compile: bool | Auto = "auto"
    shard_base: bool | Auto = "auto"
    eval_interval: Annotated[int, Field(ge=1)] | Auto = "auto"
    checkpoint_interval: Annotated[int, Field(ge=1)] | Auto = "auto"


def _checked_root(name: str) -> str:
    if not sources.is_root(name):
        raise ValueError(
            f"{name!r} is no hub id (OWNER/NAME): readers of an adapter would look for a model of that name on the"
            f" hub, whoever made it; write {sources.LOCAL}{name} if the base is on none"
        )
    return name


Root = Annotated[str, AfterValidator(_checked_root)]


class BaseModelRef(Strict):
    """Where the base model is.

    `source`: a local folder, a local `.gguf` file, `package:<python package>/<file>` or
    `hub:<owner>/<name>[@<revision>]`. `root` is the public name written into the adapter: a hub id, or
    `local:<name>`, which no hub can have (docs/decisions/0035).
    `weights`: how many numbers the layers hold that can carry a LoRA, null = counted when the base is opened. The
    default learning rate depends on it (`lorainit.config.rates`), unless `base_learning_rate` gives a measured one for
    `kaiming`. `sha256`: the expected digest of the weights (`lorainit.model.source.digest.base_sha256`), null = any.
    """

    id: str
    source: str
    root: Root
    max_length: Annotated[int, Field(ge=8)] = 2048
    weights: Annotated[int, Field(ge=1)] | None = None
    base_learning_rate: Annotated[float, Field(gt=0)] | None = None
    sha256: str | None = None


class Data(Strict):
    """Local JSONL files. `on_row_error` "skip" trains on the good rows and reports the others.

    `append_eos`: add the tokenizer's end token after the last answer, and train it, if the chat template writes no
    token there at which the model stops. `owner`: whose rows they are. Cache entries made of the rows carry this name,
    so that no other owner finds them.
    """

    training: str
    validation: str | None = None
    calibration: str | None = None
    on_row_error: Literal["fail", "skip"] = "fail"
    append_eos: bool = False
    owner: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")] | None = None


class RunSpec(Strict):
    """Everything a run needs; the same spec on the same machine gives the same adapter.

    `cache`: a folder for converted base models and, under `init/`, `tokens/` and `bases/`, for results that later runs
    use again: initializations, tokenized files and digests, at most `cache_limit_bytes` together (0 = none).
    `micro_batch_size`, `tokens_per_pass`: the most rows and tokens of a forward pass, null = chosen for speed and
    memory; with `resume_from`, null = as in the interrupted run.
    `stop_after`: the share of its steps after which the run evaluates, writes a checkpoint and ends, to be resumed
    later; never before the warm-up is over. null = the run goes to its end.
    `devices`: how many processes of this host share each step's rows, one per GPU; `python -m lorainit` starts them.
    """

    model: BaseModelRef
    data: Data
    lora: Lora = Lora()
    training: Hyperparameters = Hyperparameters()
    seed: Seed = 0
    deterministic: bool = True
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    tokens_per_pass: Annotated[int, Field(ge=1)] | None = None
    devices: Annotated[int, Field(ge=1, le=64)] = 1
    cache: str | None = None
    cache_limit_bytes: Annotated[int, Field(ge=0)] = 8 << 30
    resume_from: str | None = None
    stop_after: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def refuse_to_share_what_cannot_be_shared(self) -> "RunSpec":
        """Refuse what `explain_no_sharding` gives a reason for."""
        if why := explain_no_sharding(self.training, self.lora, devices=self.devices):
            raise refusal("training.shard_base", why)
        return self


def explain_no_sharding(training: Hyperparameters, lora: Lora, *, devices: int) -> str | None:
    """A sentence that says why this run cannot have `shard_base`; None if it can or does not ask for it."""
    if training.shard_base is not True:
        return None
    if devices == 1:
        return "shard_base divides the base between devices, and the job has one: ask for more devices."
    if lora.quantization:
        return "shard_base does not combine with a quantized base."
    if training.compile is True:
        return "shard_base does not combine with compile: layers that are divided stay uncompiled."
    return None
