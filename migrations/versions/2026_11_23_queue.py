"""queue: pausing, losses apart from attempts, turns, queues of workers

Revision: 5d2f7c1e9a40, after 5b2a9d17c8e4, 2026-11-23
"""

import sqlalchemy as sa
from alembic import op

import api.core.db.database

revision = "5d2f7c1e9a40"
down_revision = "5b2a9d17c8e4"
branch_labels = None
depends_on = None

BEFORE = "status IN ('validating_files', 'queued', 'running', 'succeeded', 'failed', 'cancelled')"
AFTER = "status IN ('validating_files', 'queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')"


def upgrade() -> None:
    with op.batch_alter_table("jobs") as batch_op:
        batch_op.add_column(sa.Column("queue", sa.String(length=32), server_default="train", nullable=False))
        batch_op.add_column(sa.Column("turn", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("losses", sa.Integer(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("not_before", api.core.db.database.UTCDateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("pause_requested", sa.Boolean(), server_default=sa.false(), nullable=False))
        batch_op.drop_constraint(op.f("ck_jobs_status"), type_="check")
        batch_op.create_check_constraint(op.f("ck_jobs_status"), AFTER)
    seconds = (
        "extract(epoch FROM created_at)"
        if op.get_bind().dialect.name == "postgresql"
        else "CAST(strftime('%s', created_at) AS REAL)"
    )
    # An hour for each level of priority, as the setting says by default.
    op.execute(f"UPDATE jobs SET turn = {seconds} - 3600 * priority WHERE status <> 'validating_files'")  # noqa: S608
    with op.batch_alter_table("jobs") as batch_op:
        batch_op.create_check_constraint(
            op.f("ck_jobs_only_runs_are_asked_to_pause"), "NOT pause_requested OR status = 'running'"
        )
        batch_op.create_check_constraint(op.f("ck_jobs_queued_has_a_turn"), "status <> 'queued' OR turn IS NOT NULL")
    # Rows of workers are renewed every ten seconds; those of the old release say nothing of queues.
    op.execute("DELETE FROM workers")
    with op.batch_alter_table("workers") as batch_op:
        batch_op.add_column(sa.Column("queues", api.core.db.database.Json(none_as_null=True), nullable=False))


def downgrade() -> None:
    with op.batch_alter_table("workers") as batch_op:
        batch_op.drop_column("queues")
    op.execute("UPDATE jobs SET status = 'queued', rung_at = NULL WHERE status = 'paused' AND turn IS NOT NULL")
    op.execute("UPDATE jobs SET status = 'validating_files' WHERE status = 'paused'")
    with op.batch_alter_table("jobs") as batch_op:
        batch_op.drop_constraint(op.f("ck_jobs_queued_has_a_turn"), type_="check")
        batch_op.drop_constraint(op.f("ck_jobs_only_runs_are_asked_to_pause"), type_="check")
        batch_op.drop_constraint(op.f("ck_jobs_status"), type_="check")
        batch_op.create_check_constraint(op.f("ck_jobs_status"), BEFORE)
        for name in ("pause_requested", "not_before", "losses", "turn", "queue"):
            batch_op.drop_column(name)
