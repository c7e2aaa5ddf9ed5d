"""Searching jobs by metadata: a row for each key-value pair of a job, in the order of job lists.

A pair is stored as 128 bits of a digest of its project, key and value, so that a long value takes as little space in
an index as a short one. Functions take a session first and never commit.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Select, func, literal, select, union_all
from sqlalchemy.orm import Session, aliased

from api.core.db.tables import SHOWN, Job, JobLabel

# Pairs are counted up to this number only, because that is enough to find a rare one.
COUNTED = 1000


def compute_digest(project_id: str, key: str, value: str) -> bytes:
    """The digest of a pair of a project: the first 128 bits of a SHA-256."""
    return hashlib.sha256(json.dumps([project_id, key, value]).encode()).digest()[:16]


def index(session: Session, job: Job) -> None:
    """Insert the rows by which a new job is found."""
    digests = [compute_digest(job.project_id, key, value) for key, value in (job.labels or {}).items()]
    session.add_all(JobLabel(digest=one, created_at=job.created_at, job_id=job.id) for one in digests)
    session.flush()


def search(session: Session, project_id: str, pairs: Mapping[str, str]) -> tuple[Select[Any], list[Any]]:
    """A query for the jobs that have all of these pairs, and the columns that order it.

    It reads the jobs with the rarest pair in order, and looks each of them up among the jobs with another pair.
    """
    rarest, *others = _sort_rarest_first(
        session, [compute_digest(project_id, key, value) for key, value in pairs.items()]
    )
    first = aliased(JobLabel)
    query = select(*SHOWN).join_from(first, Job, Job.id == first.job_id).where(first.digest == rarest)
    for other in others:
        label = aliased(JobLabel)
        same = (label.created_at == first.created_at, label.job_id == first.job_id)
        query = query.where(select(label.digest).where(label.digest == other, *same).exists())
    return query, [first.created_at, first.job_id]


def _sort_rarest_first(session: Session, digests: Sequence[bytes]) -> Sequence[bytes]:
    if len(digests) == 1:
        return digests
    counted = []
    for number, one in enumerate(digests):
        # Ordered, so that the index is read; for a frequent pair a database would otherwise read the table.
        some = select(JobLabel.job_id).where(JobLabel.digest == one).order_by(JobLabel.created_at, JobLabel.job_id)
        some = some.limit(COUNTED)
        counted.append(
            select(literal(number).label("number"), func.count().label("found")).select_from(some.subquery())
        )
    found: dict[int, int] = dict(session.execute(union_all(*counted)).all())
    return [digests[number] for number in sorted(found, key=found.__getitem__)]
