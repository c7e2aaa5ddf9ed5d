"""job_labels: jobs are found by their metadata, and those without any, by an index

Revision: b7e20f4c9d18, after 6a1d84e0f7c3, 2026-11-28
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

from api.core.db.database import Json, UTCDateTime

revision = "b7e20f4c9d18"
down_revision = "6a1d84e0f7c3"
branch_labels = None
depends_on = None

BATCH = 1000
UNLABELLED = sa.text("metadata IS NULL")
JOBS = sa.table(
    "jobs",
    sa.column("id", sa.String),
    sa.column("project_id", sa.String),
    sa.column("created_at", UTCDateTime),
    sa.column("metadata", Json),
)


def upgrade() -> None:
    labels = op.create_table(
        "job_labels",
        sa.Column("digest", sa.LargeBinary(16), nullable=False),
        sa.Column("created_at", UTCDateTime(), nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_labels_job_id_jobs"),
        sa.PrimaryKeyConstraint("digest", "created_at", "job_id", name="pk_job_labels"),
        sqlite_with_rowid=False,
    )
    for jobs in _labelled():
        op.bulk_insert(labels, [row for job in jobs for row in _rows(job)])
    op.create_index("ix_job_labels_job_id", "job_labels", ["job_id"])
    op.create_index(
        "ix_jobs_unlabelled",
        "jobs",
        ["project_id", "created_at", "id"],
        postgresql_where=UNLABELLED,
        sqlite_where=UNLABELLED,
    )


def _labelled() -> Iterator[Sequence[sa.Row[Any]]]:
    """The jobs that have metadata, batch by batch."""
    last = ""
    query = sa.select(JOBS).where(JOBS.c.metadata.is_not(None), JOBS.c.id > sa.bindparam("last"))
    while rows := op.get_bind().execute(query.order_by(JOBS.c.id).limit(BATCH), {"last": last}).all():
        yield rows
        last = rows[-1].id


def _rows(job: sa.Row[Any]) -> Iterator[dict[str, Any]]:
    for pair in job.metadata.items():
        digest = hashlib.sha256(json.dumps([job.project_id, *pair]).encode()).digest()[:16]
        yield {"digest": digest, "created_at": job.created_at, "job_id": job.id}


def downgrade() -> None:
    op.drop_index("ix_jobs_unlabelled", "jobs")
    op.drop_table("job_labels")
