"""since when database and storage have belonged together

Revision: 9d3e6f10b8a2, after c4f1a96e07d3, 2026-11-28
"""

import sqlalchemy as sa
from alembic import op

import api.core.db.database

revision = "9d3e6f10b8a2"
down_revision = "c4f1a96e07d3"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "watches",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("since", api.core.db.database.UTCDateTime(timezone=True), nullable=False),
        sa.Column("until", api.core.db.database.UTCDateTime(timezone=True), nullable=False),
        sa.Column("token", sa.String(length=64), nullable=False),
        sa.Column("next_token", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_watches")),
    )


def downgrade() -> None:
    op.drop_table("watches")
