"""open_of_project: the open jobs of a project are found without its ended ones

Revision: 6a1d84e0f7c3, after 3f90d2c64b1e, 2026-11-28
"""

import sqlalchemy as sa
from alembic import op

revision = "6a1d84e0f7c3"
down_revision = "3f90d2c64b1e"
branch_labels = None
depends_on = None

OPEN = sa.text("finished_at IS NULL")


def upgrade() -> None:
    op.create_index(
        "ix_jobs_open_of_project",
        "jobs",
        ["project_id", "status", "finished_at"],
        postgresql_where=OPEN,
        sqlite_where=OPEN,
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_open_of_project", "jobs")
