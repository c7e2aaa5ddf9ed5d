"""Rows about the service itself: counters, live workers, and since when this database owns its storage."""

from datetime import datetime

from sqlalchemy import Double, Integer, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from api.core.db.database import Base, Json, UTCDateTime


class Counter(Base):
    """A number that only grows, for /metrics.

    It is written in the transaction of what it counts, so that a write which lost its lease counts nothing.
    """

    __tablename__ = "counters"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    # JSON with sorted keys, so that equal labels are one row.
    labels: Mapped[str] = mapped_column(String(255), primary_key=True)
    value: Mapped[float] = mapped_column(Double)


class Worker(Base):
    """A worker that renews this row while it lives: how many jobs it takes, from which queues, and why not more."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    slots: Mapped[int] = mapped_column(Integer)
    queues: Mapped[list[str]] = mapped_column(Json)
    started_at: Mapped[datetime] = mapped_column(UTCDateTime)
    seen_at: Mapped[datetime] = mapped_column(UTCDateTime)
    problem: Mapped[str | None] = mapped_column(Text)


class StoragePeriod(Base):
    """A period in which this database was the only one that used its storage (`api.core.maintenance.storage_periods`).

    `until` is when the mark in the storage was last seen to be `token`; `next_token` is the one that replaces it.
    """

    __tablename__ = "storage_periods"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    since: Mapped[datetime] = mapped_column(UTCDateTime)
    until: Mapped[datetime] = mapped_column(UTCDateTime)
    token: Mapped[str] = mapped_column(String(64))
    next_token: Mapped[str] = mapped_column(String(64))
