"""grouped jobs

Revision: 1c7e5b0a94d3, after fb698f45d0e2, 2026-11-22 21:15:00
"""

import sqlalchemy as sa
from alembic import op

import api.core.db.database

revision = "1c7e5b0a94d3"
down_revision = "fb698f45d0e2"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("wants_group", sa.Boolean(), server_default=sa.false(), nullable=False))
        batch_op.add_column(sa.Column("group_key", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("trained_with", api.core.db.database.Json(none_as_null=True), nullable=True))
        batch_op.create_index(
            "ix_jobs_group", ["group_key", "project_id"], unique=False, postgresql_where=sa.text("status = 'queued'")
        )


def downgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_index("ix_jobs_group", postgresql_where=sa.text("status = 'queued'"))
        batch_op.drop_column("trained_with")
        batch_op.drop_column("group_key")
        batch_op.drop_column("wants_group")
