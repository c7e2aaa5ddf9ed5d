"""what checks of deleted files said goes, and the reconciler looks once more for what was derived from them

Revision: 8c2f5a71e6d4, after 41c7be09d2f6, 2026-11-28 12:00:00
"""

from alembic import op

revision = "8c2f5a71e6d4"
down_revision = "41c7be09d2f6"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # cleared_at NULL: `worker.maintenance.janitor.clear` takes their quotes out of jobs and events, which earlier
    # releases left.
    op.execute(
        "UPDATE files SET validation = NULL, status_details = NULL, cleared_at = NULL"
        " WHERE deleted_at IS NOT NULL AND purpose <> 'fine-tune-results'"
    )


def downgrade() -> None:
    """What was deleted does not come back."""
