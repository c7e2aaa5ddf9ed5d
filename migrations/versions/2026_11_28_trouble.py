"""why a worker takes no job

Revision: c4f1a96e07d3, after b7e20f4c9d18, 2026-11-28 00:00:00
"""

import sqlalchemy as sa
from alembic import op

revision = "c4f1a96e07d3"
down_revision = "b7e20f4c9d18"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("workers", schema=None) as batch_op:
        batch_op.add_column(sa.Column("trouble", sa.Text(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("workers", schema=None) as batch_op:
        batch_op.drop_column("trouble")
