"""lines: jobs are found by the lines they wait in; indexes of open jobs are partial on SQLite too

Revision: e5a1c07b93d4, after 8c2f5a71e6d4, 2026-11-28
"""

import sqlalchemy as sa
from alembic import op

revision = "e5a1c07b93d4"
down_revision = "8c2f5a71e6d4"
branch_labels = None
depends_on = None

OPEN, QUEUED, RUNNING = sa.text("finished_at IS NULL"), sa.text("status = 'queued'"), sa.text("status = 'running'")
NEW = {
    "ix_jobs_open": (["status", "created_at"], OPEN),
    "ix_jobs_line": (["queue", "project_id", "turn", "id"], QUEUED),
    "ix_jobs_bells": (["queue", "rung_at", "turn", "id"], QUEUED),
    "ix_jobs_group": (["group_key", "project_id", "queue", "priority", "turn", "id"], QUEUED),
    "ix_jobs_running": (["project_id"], RUNNING),
}
OLD = {
    "ix_jobs_open": (["status", "created_at"], OPEN),
    "ix_jobs_group": (["group_key", "project_id"], QUEUED),
}


def upgrade() -> None:
    for name in OLD:
        op.drop_index(name, "jobs")
    for name, (columns, where) in NEW.items():
        op.create_index(name, "jobs", columns, postgresql_where=where, sqlite_where=where)


def downgrade() -> None:
    for name in NEW:
        op.drop_index(name, "jobs")
    for name, (columns, where) in OLD.items():
        op.create_index(name, "jobs", columns, postgresql_where=where)
