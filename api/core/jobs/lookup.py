"""Finding jobs: one, a page of them, and their positions in the queue. Reads only."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, and_, bindparam, select
from sqlalchemy.orm import Session

from api.core.access import keys
from api.core.access.keys import Key
from api.core.db import database, paging
from api.core.db.tables import SHOWN, Adapter, ApiKey, File, Job, ShownJob, ShownRow
from api.core.jobs import labels, pauses
from api.core.jobs.pauses import Resumability
from api.core.jobs.transitions import unknown_job
from api.core.queue import positions
from api.core.queue.positions import QueuePosition


@dataclass(frozen=True)
class Result:
    """The adapter of a finished job and the file that holds it."""

    adapter: Adapter
    file: File


@dataclass(frozen=True)
class JobView:
    """A job with its data from other tables: everything that a caller is shown.

    It is read as a whole, so that the schemas need no session and a list takes a few queries for all its jobs.
    """

    job: ShownJob
    position: QueuePosition | None
    result: Result | None
    resumability: Resumability


def find(session: Session, project_id: str, job_id: str) -> Job:
    """A job of this project, by the id in the path.

    Another project's job gets the answer of one that never existed, so that ids cannot be probed.
    """
    job = session.get(Job, job_id)
    if job is None or job.project_id != project_id:
        raise unknown_job(job_id)
    return job


def _select_key_and_job(*columns: Any) -> Select[Any]:
    joined = select(*keys.KEY_COLUMNS, *columns).outerjoin_from(
        ApiKey, Job, and_(Job.id == bindparam("job"), Job.project_id == ApiKey.project_id)
    )
    return joined.where(ApiKey.id == bindparam("key"))


KEY_AND_JOB, KEY_AND_JOB_ID = _select_key_and_job(*SHOWN), _select_key_and_job(Job.id)


def find_with_key(key_id: str | None, job_id: str, what: Select[Any]) -> tuple[Key | None, tuple[Any, ...] | None]:
    """The key of this id, deleted or not, and the job of its project, in one statement; None for what does not exist.

    One statement, because clients ask for their job again and again until it has ended (docs/decisions/0041).

    `what` is `KEY_AND_JOB` for the columns of a `ShownRow`, or `KEY_AND_JOB_ID` for only the job's id.
    """
    # PostgreSQL would refuse an id with a NUL character, and no job has one.
    row = database.find_row(what, {"key": key_id, "job": job_id}) if key_id and "\x00" not in job_id else None
    if row is None:
        return keys.find(key_id), None
    key, job = row[: len(keys.KEY_COLUMNS)], row[len(keys.KEY_COLUMNS) :]
    return Key._make(key), None if row.id is None else job


def list_page(
    session: Session,
    project_id: str,
    *,
    after: str | None,
    limit: int,
    metadata: dict[str, str] | None = None,
    unlabelled: bool = False,
) -> tuple[Sequence[ShownJob], bool]:
    """Newest first; True when there are more.

    Args:
        metadata: every pair must match exactly.
        unlabelled: only jobs without metadata; not together with pairs.
    """
    query, position = select(*SHOWN).where(Job.project_id == project_id), None
    if metadata:
        query, position = labels.search(session, project_id, metadata)
    elif unlabelled:
        query = query.where(Job.labels.is_(None))
    query = paging.order_after(session, query, Job, project_id=project_id, after=after, position=position)
    rows, more = paging.split_page(session.execute(query.limit(limit + 1)).all(), limit)
    return [ShownRow._make(row) for row in rows], more


def load_views(session: Session, found: Sequence[ShownJob]) -> list[JobView]:
    """The jobs with their positions, results and whether they can be resumed, in a few queries for any number."""
    waiting = positions.find_positions(session, [job for job in found if job.status == "queued"])
    results = _find_results(session, [job.id for job in found if job.status == "succeeded"])
    resumable = pauses.check_resumable(session, found)
    return [JobView(job, waiting.get(job.id), results.get(job.id), resumable[job.id]) for job in found]


def load_view(session: Session, job: ShownJob) -> JobView:
    """One job as a caller is shown it."""
    return load_views(session, [job])[0]


def _find_results(session: Session, job_ids: Iterable[str]) -> dict[str, Result]:
    ids = list(job_ids)
    if not ids:
        return {}
    rows = session.execute(
        select(Adapter, File).join(File, File.id == Adapter.file_id).where(Adapter.job_id.in_(ids))
    ).all()
    return {adapter.job_id: Result(adapter, file) for adapter, file in rows}
