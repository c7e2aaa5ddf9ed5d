"""The body of `POST /v1/fine_tuning/jobs`: OpenAI's fields and ours, strict and closed."""

import json
import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from api import json_text
from api.core.jobs.echoed import EchoedFields
from api.core.jobs.submit import Order
from api.invalid import find_first_fault
from lorainit.config.schema import Seed, Strict, limit_size
from lorainit.config.spec import Choice, Hyperparameters, Lora

MAX_MULTIPLIER = 100.0  # because a larger one is a mistake
MAX_LABEL, MAX_LABELS = 512, 16
MAX_RANKS, LONGEST_NAME = 65_536, 1024  # far more than a model has; bounds so that a body is checked quickly
LORA_LABEL = "lora_config"
LORA_PARAM = f"metadata.{LORA_LABEL}"

Name = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00]+$")]
Choices = Annotated[list[Choice], Field(max_length=64, fail_fast=True)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00]+$")]
LabelValue = Annotated[str, StringConstraints(max_length=MAX_LABEL, pattern=r"^[^\x00]*$")]
Labels = Annotated[dict[Label, LabelValue], Field(max_length=MAX_LABELS), limit_size(MAX_LABELS)]


def _ranks(data: Any) -> Any:
    """Refuse the first wrong value only, because a pattern may have thousands of them."""
    for name, rank in data.items() if isinstance(data, dict) else ():
        if type(rank) is not int or len(name) > LONGEST_NAME:
            text = f"maps names of at most {LONGEST_NAME} characters to integers (got {name[:40]!r}: {str(rank)[:40]})."
            raise PydanticCustomError("invalid_value", "{text}", {"text": text})
    return data


RankPattern = Annotated[
    dict[Annotated[str, Field(max_length=LONGEST_NAME)], int],
    Field(max_length=MAX_RANKS),
    BeforeValidator(_ranks),
    limit_size(MAX_RANKS),
]


class LoraOrder(Lora):
    """`lora` of a request, which may be copied from an earlier job's answer.

    The fields that only an answer has choose nothing. They are compared with what this request leads to
    (`api.core.jobs.echoed`).
    """

    echoed_scaling: Annotated[float, Field(gt=0)] | None = Field(None, alias="scaling")  # `scaling` is computed
    rank_pattern: RankPattern | None = None
    modules: int | None = None
    trainable_parameters: int | None = None
    trainable_parameters_estimated: bool | None = None
    auto: Choices | None = None

    @model_validator(mode="after")
    def scaling_is_an_answer(self) -> "LoraOrder":
        """Refuse a scale that differs from the one of this request, because ignoring it would mislead the caller."""
        given, found = self.echoed_scaling, self.as_lora().resolve()[0].scaling
        if given is not None and not math.isclose(given, found, rel_tol=1e-6):
            text = f"scaling (got {given:g}) follows from alpha and r, which make it {found:g}: set alpha."
            raise _fault("invalid_value", "scaling", text)
        return self

    def echoed(self) -> EchoedFields:
        """The fields that only an answer has."""
        return EchoedFields(
            modules=self.modules, trainable_parameters=self.trainable_parameters, rank_pattern=self.rank_pattern or {}
        )

    def as_lora(self) -> Lora:
        """Without the fields that only an answer has."""
        return Lora.model_validate(self.model_dump(include=set(Lora.model_fields)))


class Supervised(Strict):
    """`method.supervised`. `auto` is part of an answer (what the server chose, and why) and is ignored."""

    hyperparameters: Hyperparameters = Hyperparameters()
    auto: Choices | None = None

    @field_validator("hyperparameters")
    @classmethod
    def one_rate(cls, given: Hyperparameters) -> Hyperparameters:
        """A multiplier beside an absolute rate comes from an earlier job's answer; `submit` compares the two."""
        multiplier = given.learning_rate_multiplier
        if multiplier == "auto" or given.learning_rate is not None:
            return given
        if multiplier > MAX_MULTIPLIER:
            text = f"learning_rate_multiplier must be at most {MAX_MULTIPLIER:g} (got {multiplier:g})."
            raise _fault("invalid_value", "learning_rate_multiplier", text)
        return given


class Method(Strict):
    """`method`: a type and the block of that name."""

    type: Literal["supervised"]
    supervised: Supervised = Supervised()

    @model_validator(mode="before")
    @classmethod
    def offered(cls, data: Any) -> Any:
        """Refuse methods that are not offered, with a sentence for each, and a block that belongs to another type."""
        if not isinstance(data, dict):
            return data
        kind = data.get("type")
        if kind == "reinforcement":
            raise _fault("unsupported_method", "type", "Method 'reinforcement' is not offered here.")
        if kind == "dpo":
            raise _fault("not_supported", "type", "Method 'dpo' is planned and not offered by this release.")
        for other in ("dpo", "reinforcement"):
            if data.get(other) is not None:
                raise _fault("invalid_value", other, f"{other} does not belong to a method of type {kind!r}.")
        return {key: value for key, value in data.items() if key not in ("dpo", "reinforcement")}


class Resources(Strict):
    """`resources`: on which devices a job runs, and whether together with other jobs."""

    group: bool = Field(False, description="May be trained together with other such jobs of the project.")
    device: Annotated[str, StringConstraints(max_length=32, pattern=r"^[a-z][a-z0-9_-]{0,31}$")] = Field(
        "any", description="`any`, `cpu`, `gpu` or the name of a queue that workers listen on."
    )
    devices: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="Devices of one host that share each step's rows."
    )

    @model_validator(mode="after")
    def a_group_has_one_device(self) -> "Resources":
        """Refuse a group on several devices, because several adapters share one pass on one device only."""
        if self.group and self.devices > 1:
            text = f"devices (got {self.devices}) cannot be given together with group: a grouped run has one device."
            raise _fault("invalid_value", "devices", text)
        return self


class WeightsAndBiases(Strict):
    """`integrations[].wandb`."""

    project: Label
    name: Label | None = None
    entity: Label | None = None
    tags: Annotated[list[Label], Field(max_length=64, fail_fast=True)] | None = None


class Integration(Strict):
    """`integrations[]`: a type and the block of that name."""

    type: Label
    wandb: WeightsAndBiases | None = None


class JobRequest(Strict):
    """The request for a fine-tuning job. `null` counts as absent everywhere."""

    model: Name = Field(description="Base model: its id or its hub name.")
    training_file: Name = Field(description="Id of a file with purpose `fine-tune`.")
    validation_file: Name | None = None
    suffix: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    seed: Seed | None = None
    metadata: Labels | None = Field(
        None, description="Labels. `lora_config` holds `lora` as JSON, for gateways that drop fields they do not know."
    )
    integrations: Annotated[list[Integration], Field(max_length=16, fail_fast=True)] | None = None
    method: Method | None = None
    # Not pydantic's `deprecated`, because that warns whenever we read the field ourselves.
    hyperparameters: Hyperparameters | None = Field(None, json_schema_extra={"deprecated": True})
    lora: LoraOrder = Field(LoraOrder(), description="The adapter and its initialization (extension).")
    priority: Literal["low", "normal", "high"] = "normal"
    on_row_error: Literal["fail", "skip"] = "fail"
    append_eos: bool = Field(
        False, description="Train the end token behind answers that end with no token at which the model stops."
    )
    deterministic: bool = True
    resources: Resources = Field(Resources(), description="How the job may be run (extension).")

    @model_validator(mode="before")
    @classmethod
    def lora_in_a_label(cls, data: Any) -> Any:
        """Take `lora` from `metadata.lora_config`, because some gateways pass only fields that they know."""
        labels = data.get("metadata") if isinstance(data, dict) else None
        text = labels.get(LORA_LABEL) if isinstance(labels, dict) else None
        if not isinstance(text, str) or len(text) > MAX_LABEL:
            return data  # the check of labels reports what is wrong with it
        if data.get("lora") is not None:
            raise _fault("invalid_value", LORA_PARAM, f"{LORA_PARAM} and lora are both given: give one of them.")
        return {**data, "lora": _lora_of(text)}

    @field_validator("integrations")
    @classmethod
    def none_configured(cls, given: list[Integration] | None) -> list[Integration] | None:
        """There is no integration to configure yet."""
        if given:
            text = f"integration {given[0].type!r} is not configured here."
            raise PydanticCustomError("integration_not_configured", "{text}", {"text": text})
        return given

    @field_validator("hyperparameters")
    @classmethod
    def one_rate(cls, given: Hyperparameters | None) -> Hyperparameters | None:
        """The same rule as in the method's block."""
        return given if given is None else Supervised.one_rate(given)

    @model_validator(mode="after")
    def one_recipe(self) -> "JobRequest":
        """The deprecated field may repeat the method's block, but not contradict it."""
        legacy = self.hyperparameters
        if self.method and legacy and legacy.model_dump() != self.method.supervised.hyperparameters.model_dump():
            text = "hyperparameters and method.supervised.hyperparameters differ: give one of them."
            raise _fault("invalid_value", "hyperparameters", text)
        return self

    def order(self) -> Order:
        """The same, independent of the JSON format."""
        training = self.method.supervised.hyperparameters if self.method else self.hyperparameters
        return Order(
            model=self.model,
            training_file=self.training_file,
            validation_file=self.validation_file,
            suffix=self.suffix,
            seed=self.seed,
            metadata=self.metadata,
            lora=self.lora.as_lora(),
            training=training or Hyperparameters(),
            priority=self.priority,
            on_row_error=self.on_row_error,
            append_eos=self.append_eos,
            deterministic=self.deterministic,
            group=self.resources.group,
            devices=self.resources.devices,
            device=self.resources.device,
            echoed=self.lora.echoed(),
        )


def _lora_of(text: str) -> LoraOrder:
    """The adapter that a label describes. Errors in it name the label."""
    try:
        given = json_text.parse(text, parse_constant=_no_number)
        return LoraOrder.model_validate(given)
    except (json.JSONDecodeError, json_text.Ambiguous, RecursionError) as error:
        raise _fault(
            "invalid_value", LORA_PARAM, f"{LORA_PARAM} must hold the lora object as JSON: {error}."
        ) from error
    except ValidationError as error:
        found = [{**one, "loc": ("body", "lora", *one["loc"])} for one in error.errors()]
        fault = find_first_fault(found, {"lora": given})
        raise _fault(fault.code, LORA_PARAM, f"{LORA_PARAM}: {fault.message}") from error


def _no_number(text: str) -> float:
    raise json.JSONDecodeError(f"{text} is not a JSON number", text, 0)


def _fault(code: str, param: str, text: str) -> PydanticCustomError:
    return PydanticCustomError(code, "{text}", {"text": text, "param": param})
