"""warnings of a job

Revision: 9e41b7d3c052, after 5d0c1f8e27b4, 2026-11-28 00:00:00
"""

import sqlalchemy as sa
from alembic import op

import api.core.db.database

revision = "9e41b7d3c052"
down_revision = "5d0c1f8e27b4"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("warnings", api.core.db.database.Json(none_as_null=True), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_column("warnings")
