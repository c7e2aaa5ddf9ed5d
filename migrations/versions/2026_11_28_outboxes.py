"""outboxes: ended jobs whose numbers wait to become their result file, and jobs nobody was rung for, have an index each

Revision: 3f90d2c64b1e, after 0d7f3b62c9a5, 2026-11-28
"""

import sqlalchemy as sa
from alembic import op

import api.core.db.database

revision = "3f90d2c64b1e"
down_revision = "0d7f3b62c9a5"
branch_labels = None
depends_on = None

INDEXES = {
    # SQLite counts open jobs in the index alone only if it holds all that the condition names.
    "ix_jobs_open": (["status", "created_at", "finished_at"], "finished_at IS NULL"),
    "ix_jobs_unrung": (["queue", "status", "rung_at"], "status = 'queued' AND rung_at IS NULL"),
    "ix_jobs_csv_due": (["csv_due"], "csv_due IS NOT NULL"),
}
OPEN = sa.text("finished_at IS NULL")


def upgrade() -> None:
    with op.batch_alter_table("jobs") as batch_op:
        batch_op.add_column(sa.Column("csv_due", api.core.db.database.UTCDateTime(timezone=True), nullable=True))
    # Who looked before found those without a file again and again; once more does no harm.
    op.execute("UPDATE jobs SET csv_due = finished_at WHERE finished_at IS NOT NULL AND result_file_id IS NULL")
    op.drop_index("ix_jobs_open", "jobs")
    for name, (columns, where) in INDEXES.items():
        op.create_index(name, "jobs", columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))


def downgrade() -> None:
    for name in INDEXES:
        op.drop_index(name, "jobs")
    op.create_index("ix_jobs_open", "jobs", ["status", "created_at"], postgresql_where=OPEN, sqlite_where=OPEN)
    with op.batch_alter_table("jobs") as batch_op:
        batch_op.drop_column("csv_due")
