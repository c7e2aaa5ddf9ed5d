"""What a job writes: its events and metrics while it runs, its checkpoints, and the finished adapter."""

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, Integer, String, Text, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from api.core.db.database import Base, Json, UTCDateTime


class Adapter(Base):
    """The finished adapter of a job, as the model it is called by. One per job."""

    __tablename__ = "adapters"
    __table_args__ = (
        Index(
            "ix_adapters_project_created",
            "project_id",
            "created_at",
            "job_id",
            postgresql_where=text("deleted_at IS NULL"),
            sqlite_where=text("deleted_at IS NULL"),
        ),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(String(255), unique=True)
    file_id: Mapped[str] = mapped_column(ForeignKey("files.id"), unique=True)
    rank: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    deleted_by: Mapped[str | None] = mapped_column(String(64))


class Checkpoint(Base):
    """A stored checkpoint: a loadable adapter (`file_id`) and the state to resume from (`state_key`)."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        UniqueConstraint("job_id", "step"),
        Index(
            "ix_checkpoints_uncleared",
            "deleted_at",
            postgresql_where=text("deleted_at IS NOT NULL AND cleared_at IS NULL"),
        ),
        Index("ix_checkpoints_state_key", "state_key"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str] = mapped_column(String(255), unique=True)
    step: Mapped[int] = mapped_column(Integer)
    metrics: Mapped[dict[str, Any]] = mapped_column(Json)
    best: Mapped[bool] = mapped_column()
    file_id: Mapped[str] = mapped_column(ForeignKey("files.id"))
    state_key: Mapped[str] = mapped_column(String(512))
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    deleted_by: Mapped[str | None] = mapped_column(String(64))
    # Deleted, and the state's bytes are gone too.
    cleared_at: Mapped[datetime | None] = mapped_column(UTCDateTime)


class Event(Base):
    """One event of a job; `sequence` is 1, 2, 3 ... per job without gaps."""

    __tablename__ = "events"
    __table_args__ = (UniqueConstraint("job_id", "sequence"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    sequence: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]] = mapped_column(Json)


class Metric(Base):
    """One optimizer step of the attempt that counts; `values` holds the numbers, None if not finite.

    `lease_token` is that attempt's, so that its numbers are completed and those of a lost attempt are overwritten.
    """

    __tablename__ = "metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(Integer, primary_key=True)
    lease_token: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
    values: Mapped[dict[str, Any]] = mapped_column("values", Json)
