"""Experiments: for each a row with its request and status, and a row for each cell of its grid."""

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, Double, ForeignKey, Index, Integer, String, text
from sqlalchemy.orm import Mapped, mapped_column

from api.core.db.database import Base, Json, UTCDateTime

EXPERIMENT_STATUSES = ("queued", "running", "succeeded", "failed", "cancelled")


class Experiment(Base):
    """Initializations compared on the same data. `request` is what was asked for, as it is shown."""

    __tablename__ = "experiments"
    __table_args__ = (
        CheckConstraint(f"status IN {EXPERIMENT_STATUSES}", name="status"),
        CheckConstraint("(finished_at IS NULL) = (status IN ('queued', 'running'))", name="finished"),
        Index("ix_experiments_project_created", "project_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    status: Mapped[str] = mapped_column(String(20))
    name: Mapped[str] = mapped_column(String(128))
    # "metadata" is taken by SQLAlchemy
    labels: Mapped[dict[str, str] | None] = mapped_column("metadata", Json)
    request: Mapped[dict[str, Any]] = mapped_column(Json)
    max_parallel: Mapped[int | None] = mapped_column(Integer)
    # What was decided at each rung (`api.core.experiments.halving`), in order; empty without that schedule.
    decisions: Mapped[list[Any]] = mapped_column(Json)

    @property
    def chooses_for(self) -> str | None:
        """The job whose initialization this experiment chooses (`api.core.experiments.auto`); None for all others."""
        probe: dict[str, Any] = self.request.get("probe") or {}
        return probe.get("job_id")


class Cell(Base):
    """One job of an experiment: one initialization at one rank, one learning rate and one seed.

    `job_id` is no foreign key, because a job may be removed long after its end, and what came of it stays here.
    `outcome` (`api.core.experiments.outcome`): what the ended job showed; None before.
    """

    __tablename__ = "cells"
    __table_args__ = (
        Index("ix_cells_job", "job_id", unique=True),
        Index(
            "ix_cells_waiting",
            "experiment_id",
            "number",
            postgresql_where=text("NOT released"),
            sqlite_where=text("NOT released"),
        ),
    )

    experiment_id: Mapped[str] = mapped_column(ForeignKey("experiments.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    job_id: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(255))
    # The place of its initialization in the grid, and its rank; together they are its treatment.
    init: Mapped[int] = mapped_column(Integer)
    rank: Mapped[int] = mapped_column(Integer)
    learning_rate: Mapped[float] = mapped_column(Double)
    seed: Mapped[int] = mapped_column(Integer)
    # Why it exists: "grid", "extension" or "confirmation" (`api.core.experiments.growth`).
    phase: Mapped[str] = mapped_column(String(16))
    # False: the job is paused until the experiment's limit of parallel jobs lets it start.
    released: Mapped[bool] = mapped_column()
    # The step after which the schedule stopped it; None = it was not stopped.
    stopped_at: Mapped[int | None] = mapped_column(Integer)
    outcome: Mapped[dict[str, Any] | None] = mapped_column(Json)
