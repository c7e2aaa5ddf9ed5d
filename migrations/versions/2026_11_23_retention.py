"""retention, tallies and traces

Revision: 7d20c1f4b6ae, after 5d2f7c1e9a40, 2026-11-23 01:10:00
"""

import sqlalchemy as sa
from alembic import op

import api.core.db.database

revision = "7d20c1f4b6ae"
down_revision = "5d2f7c1e9a40"
branch_labels = None
depends_on = None

UNCLEARED = sa.text("deleted_at IS NOT NULL AND cleared_at IS NULL")
EXPIRING = sa.text("expires_at IS NOT NULL AND deleted_at IS NULL")


def upgrade() -> None:
    with op.batch_alter_table("files", schema=None) as batch_op:
        batch_op.add_column(sa.Column("cleared_at", api.core.db.database.UTCDateTime(timezone=True), nullable=True))
        batch_op.create_index("ix_files_expiring", ["expires_at"], unique=False, postgresql_where=EXPIRING)
        batch_op.create_index("ix_files_uncleared", ["deleted_at"], unique=False, postgresql_where=UNCLEARED)
        batch_op.create_index("ix_files_storage_key", ["storage_key"], unique=False)
    with op.batch_alter_table("checkpoints", schema=None) as batch_op:
        batch_op.add_column(sa.Column("cleared_at", api.core.db.database.UTCDateTime(timezone=True), nullable=True))
        batch_op.create_index("ix_checkpoints_uncleared", ["deleted_at"], unique=False, postgresql_where=UNCLEARED)
        batch_op.create_index("ix_checkpoints_state_key", ["state_key"], unique=False)
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("traceparent", sa.String(length=64), nullable=True))
    op.create_table(
        "tallies",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("labels", sa.String(length=255), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", "labels", name=op.f("pk_tallies")),
    )


def downgrade() -> None:
    op.drop_table("tallies")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_column("traceparent")
    with op.batch_alter_table("checkpoints", schema=None) as batch_op:
        batch_op.drop_index("ix_checkpoints_state_key")
        batch_op.drop_index("ix_checkpoints_uncleared", postgresql_where=UNCLEARED)
        batch_op.drop_column("cleared_at")
    with op.batch_alter_table("files", schema=None) as batch_op:
        batch_op.drop_index("ix_files_storage_key")
        batch_op.drop_index("ix_files_uncleared", postgresql_where=UNCLEARED)
        batch_op.drop_index("ix_files_expiring", postgresql_where=EXPIRING)
        batch_op.drop_column("cleared_at")
