"""What earlier experiments of a project say about a new job: which initialization, at which learning rate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.core.db.tables import Experiment, File, Job
from api.core.experiments import experiments
from api.core.experiments.experiments import Treatment
from api.core.experiments.ranking import Row
from api.core.experiments.results import Results
from lorainit.config.spec import Lora

LOOKED_AT = 5  # of the newest experiments on the same base, because each has up to 256 curves to read
LENGTHS = 4.0  # a run may be so many times longer or shorter than those of the experiment: good rates change slowly
MIN_SEEDS = 2  # with one seed nothing is known of the noise


@dataclass(frozen=True)
class Known:
    """What an experiment says: an adapter with its initialization, the best rate for it, and why, as a sentence."""

    lora: Lora
    learning_rate: float
    experiment_id: str
    reason: str


def find(session: Session, job: Job, *, steps: int, batch_size: int, methods: Sequence[str] | None) -> Known | None:
    """What the newest experiment on the same base and rows says, if it asked for an adapter like this job's.

    The rows are the same if the training file is, byte for byte: only then it is known that the task is alike.

    Args:
        steps: of the job; `batch_size`: rows of one step.
        methods: the initializations that may be chosen; None = any.
    """
    rows = session.get_one(File, job.training_file_id).sha256
    mine = (
        select(Experiment)
        .where(
            Experiment.project_id == job.project_id,
            Experiment.status == "succeeded",
            Experiment.request["job"]["model"].as_string() == job.model,
            Experiment.request["schedule"].as_string() != "probe",  # those have one seed, and stop before their end
        )
        .order_by(Experiment.created_at.desc(), Experiment.id.desc())
    )
    for experiment in session.scalars(mine.limit(LOOKED_AT)):
        results = Results(experiment, experiments.read_cells(session, experiment.id))
        if not _is_alike(results, sha256=rows, steps=steps, batch_size=batch_size):
            continue
        known = _choose(session, results, job, methods)
        if known is not None:
            return known
    return None


def _is_alike(results: Results, *, sha256: str | None, steps: int, batch_size: int) -> bool:
    card = results.card
    if card is None or not card["comparable"] or results.experiment.request["objective"]["metric"] != "valid_loss":
        return False
    same = card["same"]
    length = same["steps"]
    return (
        sha256 is not None
        and same["training_sha256"] == sha256
        and same["effective_batch_size"] == batch_size
        and length is not None
        and steps / LENGTHS <= length <= steps * LENGTHS
    )


def _choose(session: Session, results: Results, job: Job, methods: Sequence[str] | None) -> Known | None:
    """The cheapest of those that are tied with the best, if this job can have it."""
    rows = [row for row in results.ranking.rows if row.summary is not None and row.summary.n >= MIN_SEEDS]
    tied = [row for row in rows if row.tied_with_best]
    for row in sorted(tied, key=lambda row: results.find_cost(row)["init_seconds"] or 0.0):
        lora = _find_lora(session, results, row, job)
        if lora is not None and (methods is None or lora.method.method in methods):
            return _describe(results, row, lora, tied=len(tied), rows=len(rows))
    return None


def _find_lora(session: Session, results: Results, row: Row, job: Job) -> Lora | None:
    """The adapter of a treatment; None if the job asks for another one apart from the initialization."""
    cell = next(iter(results.list_chosen(row)), None)
    other = None if cell is None else session.get(Job, cell.job_id)
    if other is None:  # its job was removed, so nobody knows any more what it was
        return None
    found, asked = Lora.model_validate(other.recipe["lora"]), job.recipe["lora"]
    wanted = Lora.model_validate({**asked, "init": other.recipe["lora"]["init"]}).resolve()[0]
    equal = found.model_dump(exclude={"target_modules", "left_out"}) == wanted.model_dump(
        exclude={"target_modules", "left_out"}
    )
    given: dict[str, Any] = results.experiment.request["job"].get("lora") or {}
    same_layers = given.get("target_modules", "all-linear") == asked["target_modules"]
    return found if equal and same_layers else None


def _describe(results: Results, row: Row, lora: Lora, *, tied: int, rows: int) -> Known:
    assert row.summary is not None and row.learning_rate is not None
    name = results.names[cast(Treatment, row.treatment)]
    comparison = (
        f"the cheapest of {tied} that do not differ beyond noise"
        if tied > 1
        else f"better than {'each of the other ' if rows > 2 else 'the other '}{rows - 1} beyond noise"
        if rows > 1
        else "the only one that was tried"
    )
    reason = (
        f"experiment {results.experiment.id} on the same rows: {name} at {row.learning_rate:g} has a validation loss of"
        f" {row.summary.mean:.4f} over {row.summary.n} seeds, {comparison}"
    )
    return Known(lora, row.learning_rate, results.experiment.id, reason)
