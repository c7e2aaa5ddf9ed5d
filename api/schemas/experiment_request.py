"""The body of `POST /v1/experiments`: a job without what the grid sets, and the grid."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from api.core.experiments.experiments import OWN_LABELS, ExperimentOrder, Schedule, Treatment
from api.core.experiments.grid import MAX_CELLS
from api.invalid import find_first_fault
from api.schemas.job_request import LORA_LABEL, LORA_PARAM, MAX_LABELS, JobRequest, Labels, LoraOrder
from lorainit.config.inits import Automatic, Init
from lorainit.config.schema import Seed, Strict
from lorainit.config.spec import Lora, Rate

MAX_INITS, MAX_RATES, MAX_SEEDS, MAX_RANKS = 16, 16, 32, 8
_RATES = "method.supervised.hyperparameters.learning_rate"


def _name_method(data: Any) -> Any:
    return {"method": data} if isinstance(data, str) else data


def _refuse_auto(init: Init) -> Init:
    if isinstance(init, Automatic):
        text = "'auto' chooses an initialization, so it cannot be one of those that are compared."
        raise _fault("invalid_value", text)
    return init


def _refuse_doubles(values: list[Any]) -> list[Any]:
    double = next((value for index, value in enumerate(values) if value in values[:index]), None)
    if double is not None:
        raise _fault("invalid_value", f"holds {double!r} twice: each value once.")
    return values


def _tell_rates(data: Any) -> str:
    """Which alternative a value is meant to be, so that its error is the one of that alternative."""
    return "auto" if isinstance(data, str) else "rates"


Distinct = AfterValidator(_refuse_doubles)
GridInit = Annotated[Init, BeforeValidator(_name_method), AfterValidator(_refuse_auto)]
GridRates = Annotated[list[Rate], Field(min_length=1, max_length=MAX_RATES, fail_fast=True), Distinct]
GridRank = Annotated[int, Field(ge=1, le=1024)]


class Grid(Strict):
    """What is compared: every initialization at every rank, learning rate and seed.

    `learning_rates` "auto": three rates around the catalogue's rate for each initialization. `ranks` null: the rank of
    `job.lora`.
    """

    init: Annotated[list[GridInit], Field(min_length=1, max_length=MAX_INITS, fail_fast=True), Distinct]
    learning_rates: Annotated[
        Annotated[Literal["auto"], Tag("auto")] | Annotated[GridRates, Tag("rates")], Discriminator(_tell_rates)
    ]
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=MAX_SEEDS, fail_fast=True), Distinct]
    ranks: Annotated[list[GridRank], Field(min_length=1, max_length=MAX_RANKS, fail_fast=True), Distinct] | None = None


class Objective(Strict):
    """The number by which cells are compared: of a run's evaluations the best one or the last one."""

    metric: Literal["valid_loss", "valid_mean_token_accuracy"] = "valid_loss"
    goal: Literal["min", "max"] = "min"
    at: Literal["best", "final"] = "best"

    @model_validator(mode="after")
    def better_is_better(self) -> "Objective":
        """Refuse to search for the highest loss, because that is a mistake."""
        if (self.goal == "min") != (self.metric == "valid_loss"):
            wanted = "min" if self.metric == "valid_loss" else "max"
            raise _fault("invalid_value", f"goal must be {wanted!r} for {self.metric} (got {self.goal!r}).", "goal")
        return self


class ExperimentJob(JobRequest):
    """`job`: the request for a job, without what the grid sets for each cell."""

    @model_validator(mode="before")
    @classmethod
    def without_what_the_grid_sets(cls, data: Any) -> Any:
        """Refuse the fields that each cell has its own value for."""
        if not isinstance(data, dict):
            return data
        lora, labels = data.get("lora"), data.get("metadata")
        for field in ("seed", "suffix"):
            if data.get(field) is not None:
                raise _fault("invalid_value", f"{field} is set for each job by the experiment: leave it out.", field)
        if isinstance(lora, dict) and lora.get("init") is not None:
            raise _fault("invalid_value", "lora.init is set by grid.init: leave it out.", "lora.init")
        if isinstance(labels, dict) and LORA_LABEL in labels:
            raise _fault("invalid_value", f"{LORA_PARAM} is not read here: give job.lora and grid.init.", LORA_PARAM)
        return data

    @model_validator(mode="after")
    def complete(self) -> "ExperimentJob":
        """Refuse a rate of its own and a missing validation file, and leave room for the labels of a cell."""
        if self.validation_file is None:
            text = "validation_file is required: cells are compared by their loss on it."
            raise _fault("missing_required_parameter", text, "validation_file")
        training = self.order().training
        if training.learning_rate is not None or training.learning_rate_multiplier != "auto":
            raise _fault("invalid_value", f"{_RATES} is set by grid.learning_rates: leave it out.", _RATES)
        own = len(OWN_LABELS)
        if len(self.metadata or {}) > MAX_LABELS - own:
            text = f"metadata takes at most {MAX_LABELS - own} pairs here, because each job gets {own} more."
            raise _fault("invalid_value", text, "metadata")
        clash = next((name for name in OWN_LABELS if name in (self.metadata or {})), None)
        if clash:
            raise _fault("invalid_value", f"metadata.{clash} is set by the experiment.", f"metadata.{clash}")
        return self

    @property
    def shares_passes(self) -> bool:
        """Whether cells may be trained together: unless the request says otherwise, on one device always."""
        if "resources" in self.model_fields_set and "group" in self.resources.model_fields_set:
            return self.resources.group
        return self.resources.devices == 1


class ExperimentRequest(Strict):
    """The request for an experiment."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00]+$")]
    job: ExperimentJob
    grid: Grid
    objective: Objective = Objective()
    schedule: Schedule = Field(
        "full", description="`halving`: cells that are far behind are stopped early; what is shown of them is partial."
    )
    extend: bool = Field(False, description="Add rates where a best one lies at the edge of the grid.")
    max_jobs: Annotated[int, Field(ge=1, le=MAX_CELLS)] = Field(
        MAX_CELLS, description="The most jobs of this experiment, those that `extend` adds included."
    )
    confirm_seeds: Annotated[int, Field(ge=0, le=MAX_SEEDS)] = Field(
        0, description="On how many fresh seeds the leaders and the baseline are run in the end."
    )
    max_parallel: Annotated[int, Field(ge=1, le=256)] | None = Field(
        None, description="The most jobs of this experiment that run at once; null = as many as the project may."
    )
    metadata: Labels | None = None

    @model_validator(mode="after")
    def every_treatment_is_possible(self) -> "ExperimentRequest":
        """Refuse an initialization that does not go together with the rank or another part of `job.lora`."""
        self.loras()
        return self

    def loras(self) -> dict[Treatment, Lora]:
        """The adapter of each treatment."""
        ranks = self.grid.ranks or [self.job.lora.r]
        return {
            (index, rank): self._make_lora(index, init, rank)
            for index, init in enumerate(self.grid.init)
            for rank in ranks
        }

    def _make_lora(self, index: int, init: Init, rank: int) -> Lora:
        given = {**self.job.lora.model_dump(exclude_unset=True), "init": init.model_dump(), "r": rank}
        try:
            return LoraOrder.model_validate(given).as_lora()
        except ValidationError as error:
            found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
            fault = find_first_fault(found, given)
            where = f"grid.init[{index}]"
            text = f"{where} ({init.method}, rank {rank}) could not run: {fault.message}"
            raise _fault(fault.code, text, where) from error

    def order(self) -> ExperimentOrder:
        """The same, independent of the JSON format."""
        job = self.job.order()
        return ExperimentOrder(
            name=self.name,
            job=replace(job, group=self.job.shares_passes),
            given=self.job.model_dump(mode="json", exclude_unset=True),
            loras=self.loras(),
            inits=[init.model_dump(mode="json", exclude_none=True) for init in self.grid.init],
            ranks=self.grid.ranks or [self.job.lora.r],
            rates=None if self.grid.learning_rates == "auto" else [self.grid.learning_rates] * len(self.grid.init),
            seeds=self.grid.seeds,
            objective=self.objective.model_dump(),
            schedule=self.schedule,
            extend=self.extend,
            max_jobs=self.max_jobs,
            confirm_seeds=self.confirm_seeds,
            metadata=self.metadata,
            max_parallel=self.max_parallel,
        )


def _fault(code: str, text: str, param: str = "") -> PydanticCustomError:
    return PydanticCustomError(code, "{text}", {"text": text, "param": param})
