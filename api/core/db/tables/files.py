"""Files that were uploaded and files that jobs made: a row for each, whose bytes are in storage."""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ColumnElement,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    literal_column,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from api.core.db.database import Base, Json, UTCDateTime


class File(Base):
    """Bytes in storage. A deleted file keeps its row: cursors and jobs refer to it."""

    __tablename__ = "files"
    __table_args__ = (
        CheckConstraint("status IN ('uploaded', 'processed', 'error')", name="status"),
        Index("ix_files_project_created", "project_id", "created_at", "id"),
        Index(
            "ix_files_unchecked",
            "project_id",
            "created_at",
            postgresql_where=text("status = 'uploaded'"),
            sqlite_where=text("status = 'uploaded'"),
        ),
        Index(
            "ix_files_expiring", "expires_at", postgresql_where=text("expires_at IS NOT NULL AND deleted_at IS NULL")
        ),
        Index(
            "ix_files_uncleared", "deleted_at", postgresql_where=text("deleted_at IS NOT NULL AND cleared_at IS NULL")
        ),
        Index("ix_files_storage_key", "storage_key"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    purpose: Mapped[str] = mapped_column(String(32))
    filename: Mapped[str] = mapped_column(String(255))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    storage_key: Mapped[str] = mapped_column(String(512))
    status: Mapped[str] = mapped_column(String(16))
    status_details: Mapped[str | None] = mapped_column(Text)
    validation: Mapped[dict[str, Any] | None] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    deleted_by: Mapped[str | None] = mapped_column(String(64))
    # Deleted, and the bytes are gone too. A column of its own, because clearing may fail and is then tried again.
    cleared_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    # How often a check of its rows was begun (`api.core.files.validation`), and until when no
    # other check may begin.
    checks: Mapped[int] = mapped_column(Integer, server_default="0")
    check_until: Mapped[datetime | None] = mapped_column(UTCDateTime)


def is_unchecked() -> ColumnElement[bool]:
    """True of files whose rows are not checked yet. Written into the statement for the reason in `has_status`."""
    return File.status == literal_column("'uploaded'")
