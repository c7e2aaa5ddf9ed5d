"""The tables, a file for each subject. Constraints carry the invariants; times are UTC.

Everything that a tenant owns carries `project_id`. Import tables from here: foreign keys are resolved by name, so
SQLAlchemy has to know all of them.
"""

from api.core.db.tables.jobs import (
    FINAL_STATUSES,
    JOB_STATUSES,
    ROLES,
    SHOWN,
    Adapter,
    ApiKey,
    Checkpoint,
    Creation,
    Event,
    File,
    Job,
    JobLabel,
    Metric,
    Project,
    ShownJob,
    ShownRow,
    Tally,
    Watch,
    Worker,
    has_status,
    is_unchecked,
    shown_status,
)

__all__ = [
    "FINAL_STATUSES",
    "JOB_STATUSES",
    "ROLES",
    "SHOWN",
    "Adapter",
    "ApiKey",
    "Checkpoint",
    "Creation",
    "Event",
    "File",
    "Job",
    "JobLabel",
    "Metric",
    "Project",
    "ShownJob",
    "ShownRow",
    "Tally",
    "Watch",
    "Worker",
    "has_status",
    "is_unchecked",
    "shown_status",
]
