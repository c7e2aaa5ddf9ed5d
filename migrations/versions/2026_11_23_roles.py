"""roles of API keys

Revision: 5d0c1f8e27b4, after 7d20c1f4b6ae, 2026-11-23 01:10:00
"""

import sqlalchemy as sa
from alembic import op

revision = "5d0c1f8e27b4"
down_revision = "7d20c1f4b6ae"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Keys made before there were roles become members: an upgrade gives nobody a right.
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.add_column(sa.Column("role", sa.String(length=16), server_default="member", nullable=False))
        batch_op.create_check_constraint(op.f("ck_api_keys_role"), "role IN ('admin', 'member')")


def downgrade() -> None:
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.drop_constraint(op.f("ck_api_keys_role"), type_="check")
        batch_op.drop_column("role")
