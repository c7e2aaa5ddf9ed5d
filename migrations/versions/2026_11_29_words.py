"""plain names: priority_time, lost_runs, notified_at and problem; the tables counters and storage_periods

Revision: e1f6c83d5b07, after 9d3e6f10b8a2, 2026-11-29
"""

from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from alembic import op

revision = "e1f6c83d5b07"
down_revision = "9d3e6f10b8a2"
branch_labels = None
depends_on = None

TABLES = {"tallies": "counters", "watches": "storage_periods"}
COLUMNS = {
    "jobs": {"turn": "priority_time", "losses": "lost_runs", "rung_at": "notified_at"},
    "workers": {"trouble": "problem"},
}
BEFORE, AFTER = "queued_has_a_turn", "queued_has_a_priority_time"
# Each old index with its new name, its columns (by their new names) and its condition.
INDEXES: Mapping[str, tuple[str, Sequence[str], str]] = {
    "ix_jobs_line": (
        "ix_jobs_project_queue",
        ("queue", "project_id", "priority_time", "id"),
        "status = 'queued'",
    ),
    "ix_jobs_bells": ("ix_jobs_notified", ("queue", "notified_at", "priority_time", "id"), "status = 'queued'"),
    "ix_jobs_unrung": (
        "ix_jobs_unnotified",
        ("queue", "status", "notified_at"),
        "status = 'queued' AND notified_at IS NULL",
    ),
}


def upgrade() -> None:
    for old in INDEXES:
        op.drop_index(old, "jobs")
    for old, new in TABLES.items():
        _rename_table(old, new)
    for table, names in COLUMNS.items():
        for old, new in names.items():
            # Written out: Alembic would copy the whole table on SQLite, which has had this statement since 3.25.
            op.execute(f"ALTER TABLE {table} RENAME COLUMN {old} TO {new}")
    _replace_check(BEFORE, AFTER, "priority_time")
    for name, columns, where in INDEXES.values():
        op.create_index(name, "jobs", columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))


def downgrade() -> None:
    for name, _, _ in INDEXES.values():
        op.drop_index(name, "jobs")
    for old, new in TABLES.items():
        _rename_table(new, old)
    for table, names in COLUMNS.items():
        for old, new in names.items():
            op.execute(f"ALTER TABLE {table} RENAME COLUMN {new} TO {old}")
    _replace_check(AFTER, BEFORE, "turn")
    before = {new: old for old, new in COLUMNS["jobs"].items()}
    for old, (_, columns, where) in INDEXES.items():
        condition = sa.text(where.replace("notified_at", "rung_at"))
        keys = [before.get(name, name) for name in columns]
        op.create_index(old, "jobs", keys, postgresql_where=condition, sqlite_where=condition)


def _rename_table(old: str, new: str) -> None:
    op.rename_table(old, new)
    if op.get_bind().dialect.name == "postgresql":  # SQLite has no statement to rename a primary key
        op.execute(f"ALTER INDEX pk_{old} RENAME TO pk_{new}")


def _replace_check(old: str, new: str, column: str) -> None:
    with op.batch_alter_table("jobs") as batch_op:
        batch_op.drop_constraint(op.f(f"ck_jobs_{old}"), type_="check")
        batch_op.create_check_constraint(op.f(f"ck_jobs_{new}"), f"status <> 'queued' OR {column} IS NOT NULL")
