"""The tables, a file for each subject. Constraints carry the invariants; times are UTC.

Everything that a tenant owns carries `project_id`. Import tables from here: foreign keys are resolved by name, so
SQLAlchemy has to know all of them.
"""

from api.core.db.tables.experiments import EXPERIMENT_STATUSES, Cell, Experiment
from api.core.db.tables.files import File, is_unchecked
from api.core.db.tables.jobs import (
    FINAL_STATUSES,
    JOB_STATUSES,
    SHOWN,
    Job,
    JobLabel,
    ShownJob,
    ShownRow,
    has_status,
    shown_status,
)
from api.core.db.tables.projects import ROLES, ApiKey, Creation, Project
from api.core.db.tables.results import Adapter, Checkpoint, Event, Metric
from api.core.db.tables.service import Counter, StoragePeriod, Worker

__all__ = [
    "EXPERIMENT_STATUSES",
    "FINAL_STATUSES",
    "JOB_STATUSES",
    "ROLES",
    "SHOWN",
    "Adapter",
    "ApiKey",
    "Cell",
    "Checkpoint",
    "Counter",
    "Creation",
    "Event",
    "Experiment",
    "File",
    "Job",
    "JobLabel",
    "Metric",
    "Project",
    "ShownJob",
    "ShownRow",
    "StoragePeriod",
    "Worker",
    "has_status",
    "is_unchecked",
    "shown_status",
]
