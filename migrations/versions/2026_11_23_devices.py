"""devices of a job

Revision: 5b2a9d17c8e4, after 1c7e5b0a94d3, 2026-11-23 01:00:00
"""

import sqlalchemy as sa
from alembic import op

revision = "5b2a9d17c8e4"
down_revision = "1c7e5b0a94d3"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("devices", sa.Integer(), server_default="1", nullable=False))


def downgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_column("devices")
