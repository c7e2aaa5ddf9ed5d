"""who checks a file, how often it was begun, and an index to find the next by project

Revision: 41c7be09d2f6, after 4b8a0f6d92e1, 2026-11-28 08:00:00
"""

import sqlalchemy as sa
from alembic import op

import api.core.db.database

revision = "41c7be09d2f6"
down_revision = "4b8a0f6d92e1"
branch_labels = None
depends_on = None

UNCHECKED = sa.text("status = 'uploaded'")


def upgrade() -> None:
    with op.batch_alter_table("files", schema=None) as batch_op:
        batch_op.add_column(sa.Column("checks", sa.Integer(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("check_until", api.core.db.database.UTCDateTime(timezone=True), nullable=True))
        batch_op.drop_index("ix_files_unchecked")
        batch_op.create_index(
            "ix_files_unchecked",
            ["project_id", "created_at"],
            unique=False,
            postgresql_where=UNCHECKED,
            sqlite_where=UNCHECKED,
        )


def downgrade() -> None:
    with op.batch_alter_table("files", schema=None) as batch_op:
        batch_op.drop_index("ix_files_unchecked", postgresql_where=UNCHECKED, sqlite_where=UNCHECKED)
        batch_op.create_index("ix_files_unchecked", ["created_at"], unique=False, postgresql_where=UNCHECKED)
        batch_op.drop_column("check_until")
        batch_op.drop_column("checks")
