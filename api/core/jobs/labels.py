"""The metadata of jobs as what they are searched by: a row for each pair of a job, in the order of lists.

A pair is kept as 128 bits of a digest of its project, key and value, so that a long value takes as little room in an
index as a short one. Functions take a session first and never commit.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Select, func, literal, select, union_all
from sqlalchemy.orm import Session, aliased

from api.core.db.tables import SHOWN, Job, JobLabel

# To find out which pair is the rarest, none is counted further than this.
COUNTED = 1000


def digest(project_id: str, key: str, value: str) -> bytes:
    """What stands for a pair of a project: the first 128 bits of a SHA-256."""
    return hashlib.sha256(json.dumps([project_id, key, value]).encode()).digest()[:16]


def index(session: Session, job: Job) -> None:
    """Let this new job be found by its metadata."""
    digests = [digest(job.project_id, key, value) for key, value in (job.labels or {}).items()]
    session.add_all(JobLabel(digest=one, created_at=job.created_at, job_id=job.id) for one in digests)
    session.flush()


def search(session: Session, project_id: str, pairs: Mapping[str, str]) -> tuple[Select[Any], list[Any]]:
    """What finds the jobs that have every one of these pairs, and the columns that are their place in a list.

    Those with the rarest pair are gone through in order, and each is looked up among those with another.
    """
    rarest, *others = _rarest_first(session, [digest(project_id, key, value) for key, value in pairs.items()])
    first = aliased(JobLabel)
    query = select(*SHOWN).join_from(first, Job, Job.id == first.job_id).where(first.digest == rarest)
    for other in others:
        label = aliased(JobLabel)
        same = (label.created_at == first.created_at, label.job_id == first.job_id)
        query = query.where(select(label.digest).where(label.digest == other, *same).exists())
    return query, [first.created_at, first.job_id]


def _rarest_first(session: Session, digests: Sequence[bytes]) -> Sequence[bytes]:
    if len(digests) == 1:
        return digests
    counted = []
    for number, one in enumerate(digests):
        # In order, so that the index is read even where a pair is so frequent that a database would take any rows.
        some = select(JobLabel.job_id).where(JobLabel.digest == one).order_by(JobLabel.created_at, JobLabel.job_id)
        some = some.limit(COUNTED)
        counted.append(
            select(literal(number).label("number"), func.count().label("found")).select_from(some.subquery())
        )
    found: dict[int, int] = dict(session.execute(union_all(*counted)).all())
    return [digests[number] for number in sorted(found, key=found.__getitem__)]
