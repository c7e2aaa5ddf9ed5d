"""Jobs: for each a row with request, status and results, and the rows by which its metadata is searched.

A job's row is the truth about it.
"""

from collections import namedtuple
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ColumnElement,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    false,
    literal_column,
    text,
)
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.orm.util import AliasedClass

from api.core.db.database import Base, Json, UTCDateTime

JOB_STATUSES = ("validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled")
FINAL_STATUSES = ("succeeded", "failed", "cancelled")


def shown_status(status: str, pause_requested: bool) -> str:
    """The status a caller sees."""
    return "pausing" if pause_requested else status


def _partial(name: str, *columns: str, where: str) -> Index:
    """An index of only the rows that meet a condition, on both databases."""
    return Index(name, *columns, postgresql_where=text(where), sqlite_where=text(where))


class Job(Base):
    """One fine-tuning job: its request, recipe, status and results."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(f"status IN {JOB_STATUSES}", name="status"),
        CheckConstraint(f"(finished_at IS NULL) = (status NOT IN {FINAL_STATUSES})", name="finished"),
        CheckConstraint("(error IS NOT NULL) = (status = 'failed')", name="error_only_when_failed"),
        CheckConstraint("NOT pause_requested OR status = 'running'", name="only_runs_are_asked_to_pause"),
        CheckConstraint("status <> 'queued' OR priority_time IS NOT NULL", name="queued_has_a_priority_time"),
        Index("ix_jobs_project_created", "project_id", "created_at", "id"),
        # A database uses such an index only for statements that contain its condition literally (`has_status`).
        _partial("ix_jobs_open", "status", "created_at", "finished_at", where="finished_at IS NULL"),
        _partial("ix_jobs_open_of_project", "project_id", "status", "finished_at", where="finished_at IS NULL"),
        _partial("ix_jobs_project_queue", "queue", "project_id", "priority_time", "id", where="status = 'queued'"),
        _partial("ix_jobs_notified", "queue", "notified_at", "priority_time", "id", where="status = 'queued'"),
        _partial(
            "ix_jobs_group",
            "group_key",
            "project_id",
            "queue",
            "priority",
            "priority_time",
            "id",
            where="status = 'queued'",
        ),
        _partial("ix_jobs_running", "project_id", where="status = 'running'"),
        _partial(
            "ix_jobs_unnotified", "queue", "status", "notified_at", where="status = 'queued' AND notified_at IS NULL"
        ),
        _partial("ix_jobs_csv_due", "csv_due", where="csv_due IS NOT NULL"),
        _partial("ix_jobs_experiment_due", "experiment_id", where="experiment_due IS NOT NULL"),
        _partial("ix_jobs_unlabelled", "project_id", "created_at", "id", where="metadata IS NULL"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    status: Mapped[str] = mapped_column(String(20))
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)

    # What was ordered. `recipe` is {"lora": Lora, "training": Hyperparameters}; autos until admitted.
    model: Mapped[str] = mapped_column(String(255))
    training_file_id: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int] = mapped_column(Integer)
    # "metadata" is taken by SQLAlchemy
    labels: Mapped[dict[str, str] | None] = mapped_column("metadata", Json)
    integrations: Mapped[list[Any]] = mapped_column(Json)
    recipe: Mapped[dict[str, Any]] = mapped_column(Json)
    choices: Mapped[list[Any]] = mapped_column(Json)
    priority: Mapped[int] = mapped_column(Integer)
    on_row_error: Mapped[str] = mapped_column(String(8))
    append_eos: Mapped[bool] = mapped_column(server_default=false())
    deterministic: Mapped[bool] = mapped_column()
    wants_group: Mapped[bool] = mapped_column(server_default=false())
    devices: Mapped[int] = mapped_column(Integer, server_default="1")

    # Which workers may take it, and when its turn comes (`api.core.queue.scheduling`); NULL before admission.
    queue: Mapped[str] = mapped_column(String(32), server_default="train")
    priority_time: Mapped[float | None] = mapped_column(Double)
    # Runs since the last checkpoint that ended for no fault of the job, and when the next run may start.
    lost_runs: Mapped[int] = mapped_column(Integer, server_default="0")
    not_before: Mapped[datetime | None] = mapped_column(UTCDateTime)
    # A request, not a state: whoever runs the job leaves it `paused` instead of `queued`.
    pause_requested: Mapped[bool] = mapped_column(server_default=false())

    # The experiment that it is a cell of; no foreign key, because SQLite would copy the whole table to add one.
    experiment_id: Mapped[str | None] = mapped_column(String(64), index=True)
    # The share of its steps after which a run pauses by itself; None = never. `halted_at`: the step at which it did.
    stop_after: Mapped[float | None] = mapped_column(Double)
    halted_at: Mapped[int | None] = mapped_column(Integer)
    # Another outbox: since when a change of status waits for the experiment to take note of it; None once it has.
    experiment_due: Mapped[datetime | None] = mapped_column(UTCDateTime)

    # Who may be trained with it (`api.core.queue.groups`), from admission on; None = it runs alone.
    group_key: Mapped[str | None] = mapped_column(String(64))
    # Ids of the other jobs in the process of its last start; None before the first.
    trained_with: Mapped[list[str] | None] = mapped_column(Json)

    # Who runs it. `lease_token` counts claims: a write that carries an older one is refused.
    lease_token: Mapped[int] = mapped_column(Integer)
    lease_owner: Mapped[str | None] = mapped_column(String(128))
    lease_until: Mapped[datetime | None] = mapped_column(UTCDateTime)
    attempts: Mapped[int] = mapped_column(Integer)
    started_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    # The outbox: a queued job with notified_at NULL has not been announced to the workers yet. It is a column of the
    # job, so that a job and the fact that it has to be announced are committed together.
    notified_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    event_count: Mapped[int] = mapped_column(Integer)
    # The trace of the request that ordered it (W3C), so that any worker can continue it; None without one.
    traceparent: Mapped[str | None] = mapped_column(String(64))

    # What came of it.
    progress: Mapped[dict[str, Any] | None] = mapped_column(Json)
    plan: Mapped[dict[str, Any] | None] = mapped_column(Json)
    init_report: Mapped[dict[str, Any] | None] = mapped_column(Json)
    export_check: Mapped[dict[str, Any] | None] = mapped_column(Json)
    resources: Mapped[dict[str, Any] | None] = mapped_column(Json)
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    # What its author should know although it succeeded; None before its end.
    warnings: Mapped[list[dict[str, Any]] | None] = mapped_column(Json)
    result_file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    # Another outbox: since when the job's metrics wait to become its result file; None once that is done.
    csv_due: Mapped[datetime | None] = mapped_column(UTCDateTime)

    @property
    def shown_status(self) -> str:
        """The status a caller sees: a run that was asked to pause is `pausing`."""
        return shown_status(self.status, self.pause_requested)

    @hybrid_property
    def calibration_file_id(self) -> str | None:
        """`lora.init.calibration_file`; None for methods without data, and for the training file's rows."""
        found: str | None = self.recipe["lora"]["init"].get("calibration_file")
        return found

    @calibration_file_id.inplace.expression
    @classmethod
    def _calibration_file_id(cls) -> ColumnElement[str | None]:
        found: ColumnElement[str | None] = cls.recipe["lora"]["init"]["calibration_file"].as_string()
        return found


class JobLabel(Base):
    """One key-value pair of a job's metadata, as a digest (`api.core.jobs.labels`). Searches read them in order."""

    __tablename__ = "job_labels"
    __table_args__ = ({"sqlite_with_rowid": False},)

    digest: Mapped[bytes] = mapped_column(LargeBinary(16), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True, index=True)


# The columns of a job that callers do not see. The others are read as plain columns, because that takes a third of the
# time of loading a `Job`.
_HIDDEN = {
    "group_key",
    "priority_time",
    "lease_token",
    "lease_owner",
    "lease_until",
    "notified_at",
    "event_count",
    "traceparent",
    "csv_due",
    "experiment_due",
    "stop_after",
    "halted_at",
}
_NAMES = [name for name, _ in Job.__mapper__.column_attrs.items() if name not in _HIDDEN]
SHOWN = [getattr(Job, name).label(name) for name in _NAMES]
# A named tuple, because one answer reads some sixty fields, and reading from a tuple is faster than from a `Row`.
ShownRow: Any = namedtuple("ShownRow", _NAMES)  # type: ignore[misc]  # its names are the mapper's
ShownJob = Job | Any


def has_status(job: "type[Job] | AliasedClass[Job]", status: str) -> ColumnElement[bool]:
    """True of jobs with that status.

    The status is written into the statement, because a database uses no partial index if the value of its condition
    is a parameter.
    """
    assert status in JOB_STATUSES
    found: ColumnElement[bool] = job.status == literal_column(f"'{status}'")
    return found
