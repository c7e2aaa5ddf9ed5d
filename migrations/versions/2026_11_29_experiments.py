"""experiments and their cells

Revision: 4b7a20e9d6c3, after e1f6c83d5b07, 2026-11-29
"""

import sqlalchemy as sa
from alembic import op

from api.core.db.database import Json, UTCDateTime

revision = "4b7a20e9d6c3"
down_revision = "e1f6c83d5b07"
branch_labels = None
depends_on = None

DUE = sa.text("experiment_due IS NOT NULL")
WAITING = sa.text("NOT released")


def upgrade() -> None:
    op.create_table(
        "experiments",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("project_id", sa.String(64), nullable=False),
        sa.Column("created_at", UTCDateTime(), nullable=False),
        sa.Column("finished_at", UTCDateTime(), nullable=True),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("metadata", Json, nullable=True),
        sa.Column("request", Json, nullable=False),
        sa.Column("max_parallel", sa.Integer(), nullable=True),
        sa.Column("decisions", Json, nullable=False),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name=op.f("ck_experiments_status")
        ),
        sa.CheckConstraint(
            "(finished_at IS NULL) = (status IN ('queued', 'running'))", name=op.f("ck_experiments_finished")
        ),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_experiments_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_experiments")),
    )
    op.create_index("ix_experiments_project_created", "experiments", ["project_id", "created_at", "id"])
    op.create_table(
        "cells",
        sa.Column("experiment_id", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("init", sa.Integer(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("learning_rate", sa.Double(), nullable=False),
        sa.Column("seed", sa.Integer(), nullable=False),
        sa.Column("phase", sa.String(16), nullable=False),
        sa.Column("released", sa.Boolean(), nullable=False),
        sa.Column("stopped_at", sa.Integer(), nullable=True),
        sa.Column("outcome", Json, nullable=True),
        sa.ForeignKeyConstraint(["experiment_id"], ["experiments.id"], name=op.f("fk_cells_experiment_id_experiments")),
        sa.PrimaryKeyConstraint("experiment_id", "number", name=op.f("pk_cells")),
    )
    op.create_index("ix_cells_job", "cells", ["job_id"], unique=True)
    op.create_index(
        "ix_cells_waiting",
        "cells",
        ["experiment_id", "number"],
        postgresql_where=WAITING,
        sqlite_where=WAITING,
    )
    op.add_column("jobs", sa.Column("experiment_id", sa.String(64), nullable=True))
    op.add_column("jobs", sa.Column("experiment_due", UTCDateTime(), nullable=True))
    op.add_column("jobs", sa.Column("stop_after", sa.Double(), nullable=True))
    op.add_column("jobs", sa.Column("halted_at", sa.Integer(), nullable=True))
    op.create_index(op.f("ix_jobs_experiment_id"), "jobs", ["experiment_id"])
    op.create_index("ix_jobs_experiment_due", "jobs", ["experiment_id"], postgresql_where=DUE, sqlite_where=DUE)


def downgrade() -> None:
    op.drop_index("ix_jobs_experiment_due", "jobs")
    op.drop_index(op.f("ix_jobs_experiment_id"), "jobs")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("halted_at")
        jobs.drop_column("stop_after")
        jobs.drop_column("experiment_due")
        jobs.drop_column("experiment_id")
    op.drop_table("cells")
    op.drop_table("experiments")
