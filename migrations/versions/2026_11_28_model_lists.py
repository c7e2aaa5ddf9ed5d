"""adapters are found in the order in which they are listed

Revision: 0d7f3b62c9a5, after e5a1c07b93d4, 2026-11-28
"""

import sqlalchemy as sa
from alembic import op

revision = "0d7f3b62c9a5"
down_revision = "e5a1c07b93d4"
branch_labels = None
depends_on = None

THERE = sa.text("deleted_at IS NULL")
LISTED = ["project_id", "created_at", "job_id"]


def upgrade() -> None:
    op.drop_index("ix_adapters_project_id", "adapters")
    op.create_index("ix_adapters_project_created", "adapters", LISTED, postgresql_where=THERE, sqlite_where=THERE)


def downgrade() -> None:
    op.drop_index("ix_adapters_project_created", "adapters")
    op.create_index("ix_adapters_project_id", "adapters", ["project_id"])
