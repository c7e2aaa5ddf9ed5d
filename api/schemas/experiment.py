"""The experiment object: its request, how far it is, and the table of results so far."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from api.core.db.tables import Cell, Experiment
from api.core.experiments.experiments import Treatment
from api.core.experiments.ranking import Difference, Interval, Row, Summary
from api.core.experiments.results import Results
from api.schemas.wire import Element, Wire, to_unix, to_unix_or_none

# The statuses of jobs that are shown as one: a job that is checked or paused has not started or waits for its turn.
_COUNTED = {"validating_files": "queued", "paused": "queued"}
DIGITS = 6  # of losses, as many as differences between seeds are ever worth


class JobCounts(Wire):
    """How many jobs of an experiment have which status."""

    total: int
    queued: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0


class ObjectiveSummary(Wire):
    """The objective over seeds. `std`: the sample standard deviation; `ci95`: Student's interval of the mean."""

    n: int
    mean: float
    std: float | None
    min: float
    max: float
    ci95: tuple[float, float] | None


class RateSummary(Wire):
    """The objective at one learning rate."""

    learning_rate: float
    n: int
    mean: float | None
    std: float | None


class DifferenceToBest(Wire):
    """How much worse than the first row, paired by seed.

    `ci95` is Student's interval of this difference alone. `family_ci95` holds together with those of all other rows;
    it decides `tied_with_best`.
    """

    paired: Literal[True] = True
    mean: float
    ci95: tuple[float, float] | None
    family_ci95: tuple[float, float] | None


class Cost(Wire):
    """What a run of this row cost on average; of memory the most."""

    init_seconds: float | None
    train_seconds: float | None
    gpu_seconds: float | None
    peak_memory_bytes: int | None


class Losses(Wire):
    """Mean validation losses over the seeds, at the row's learning rate.

    `at_equal_*`: after as many steps, tokens or seconds as the cheapest of the rows' runs had. What an initialization
    spends before training counts there: preheating as steps and tokens, its seconds as seconds.
    """

    final: float | None = None
    best: float | None = None
    at_equal_steps: float | None = None
    at_equal_tokens: float | None = None
    at_equal_seconds: float | None = None


class Speed(Wire):
    """The part of the baseline's steps, tokens and seconds after which its final validation loss is reached.

    What the initialization spends counts, as in `Losses`. Null if not every seed reaches it.
    """

    steps: float | None
    tokens: float | None
    seconds: float | None


class ExperimentRow(Wire):
    """One initialization at its best learning rate."""

    rank: int
    tied_with_best: bool
    name: str
    init: dict[str, Any]
    r: int
    learning_rate: float | None
    objective: ObjectiveSummary | None
    difference_to_best: DifferenceToBest | None
    by_learning_rate: list[RateSummary]
    learning_rate_at_edge: bool
    failed_runs: int
    stopped_at_step: int | None
    valid_loss: Losses
    cost: Cost
    to_baseline_loss: Speed
    trainable_parameters: int | None
    export_rank: int | None
    adapter_bytes: int | None
    job_ids: list[str]


class Confirmation(Wire):
    """The leaders and the baseline on fresh seeds, at the rates that the grid found best for them."""

    summary: list[str]
    results: list[ExperimentRow]


class ExperimentObject(Element):
    """An experiment. `results` grows while it runs; `summary` says in sentences what they mean.

    `plan`: what the experiment will be able to tell with its number of seeds. `chooses_for`: the job for which it
    chooses the initialization (`lora.init` "auto"); null for one that somebody asked for.
    """

    id: str
    object: Literal["experiment"] = "experiment"
    created_at: int
    finished_at: int | None
    name: str
    status: str
    project_id: str
    metadata: dict[str, str] | None
    job: dict[str, Any]
    grid: dict[str, Any]
    objective: dict[str, str]
    schedule: str
    extend: bool
    max_jobs: int
    confirm_seeds: int
    chooses_for: str | None
    decisions: list[dict[str, Any]]
    max_parallel: int | None
    job_counts: JobCounts
    error: None
    plan: str
    summary: list[str]
    results: list[ExperimentRow]
    confirmation: Confirmation | None
    card: dict[str, Any] | None


def make_experiment_object(
    experiment: Experiment, cells: Sequence[Cell], counts: Mapping[str, int]
) -> ExperimentObject:
    """A row, its cells and the statuses of its jobs, as the caller sees them."""
    found = Results(experiment, cells)
    request = experiment.request
    return ExperimentObject(
        id=experiment.id,
        created_at=to_unix(experiment.created_at),
        finished_at=to_unix_or_none(experiment.finished_at),
        name=experiment.name,
        status=experiment.status,
        project_id=experiment.project_id,
        metadata=experiment.labels,
        job=request["job"],
        grid=request["grid"],
        objective=request["objective"],
        schedule=request["schedule"],
        extend=request["extend"],
        max_jobs=request["max_jobs"],
        confirm_seeds=request["confirm_seeds"],
        chooses_for=experiment.chooses_for,
        decisions=experiment.decisions,
        max_parallel=experiment.max_parallel,
        job_counts=_count(counts),
        error=None,
        plan=request["plan"],
        summary=found.summary,
        results=_rows(found),
        confirmation=_confirmation(found),
        card=found.card,
    )


def _count(counts: Mapping[str, int]) -> JobCounts:
    shown = dict.fromkeys(JobCounts.model_fields, 0)
    for status, count in counts.items():
        shown[_COUNTED.get(status, status)] += count
    return JobCounts(**{**shown, "total": sum(counts.values())})


def _confirmation(found: Results) -> Confirmation | None:
    fresh = found.confirmation
    return None if fresh is None else Confirmation(summary=fresh.summary, results=_rows(fresh))


def _rows(found: Results) -> list[ExperimentRow]:
    return [_row(found, row, position) for position, row in enumerate(found.ranking.rows, start=1)]


def _row(found: Results, row: Row, position: int) -> ExperimentRow:
    chosen = found.list_chosen(row)
    init, rank = cast(Treatment, row.treatment)
    return ExperimentRow(
        rank=position,
        tied_with_best=row.tied_with_best,
        name=found.names[init, rank],
        init=found.experiment.request["grid"]["init"][init],
        r=rank,
        learning_rate=row.learning_rate,
        objective=_summary(row.summary),
        difference_to_best=_difference(row.difference),
        by_learning_rate=[_rate(rate, summary) for rate, summary in row.by_rate.items()],
        learning_rate_at_edge=row.at_edge,
        failed_runs=row.failed_runs,
        stopped_at_step=found.find_stop(row),
        valid_loss=_losses(found.find_losses(row)),
        cost=Cost.model_validate(found.find_cost(row)),
        to_baseline_loss=Speed.model_validate(found.find_speed(row)),
        job_ids=[cell.job_id for cell in chosen],
        **found.find_sizes(row),
    )


def _summary(summary: Summary | None) -> ObjectiveSummary | None:
    if summary is None:
        return None
    return ObjectiveSummary(
        n=summary.n,
        mean=_round(summary.mean),
        std=None if summary.std is None else _round(summary.std),
        min=_round(summary.min),
        max=_round(summary.max),
        ci95=_interval(summary.ci95),
    )


def _losses(losses: Mapping[str, float | None]) -> Losses:
    return Losses(**{name: None if loss is None else _round(loss) for name, loss in losses.items()})


def _rate(rate: float, summary: Summary | None) -> RateSummary:
    mean, std = (None, None) if summary is None else (summary.mean, summary.std)
    return RateSummary(
        learning_rate=rate,
        n=summary.n if summary else 0,
        mean=None if mean is None else _round(mean),
        std=None if std is None else _round(std),
    )


def _difference(difference: Difference | None) -> DifferenceToBest | None:
    if difference is None:
        return None
    return DifferenceToBest(
        mean=_round(difference.mean),
        ci95=_interval(difference.ci95),
        family_ci95=_interval(difference.family_ci95),
    )


def _interval(interval: Interval | None) -> tuple[float, float] | None:
    return None if interval is None else (_round(interval.low), _round(interval.high))


def _round(value: float) -> float:
    return round(value, DIGITS)
