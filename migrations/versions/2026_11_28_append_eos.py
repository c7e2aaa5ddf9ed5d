"""append_eos of a job

Revision: 4b8a0f6d92e1, after 9e41b7d3c052, 2026-11-28 01:00:00
"""

import sqlalchemy as sa
from alembic import op

revision = "4b8a0f6d92e1"
down_revision = "9e41b7d3c052"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("append_eos", sa.Boolean(), server_default=sa.false(), nullable=False))


def downgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_column("append_eos")
