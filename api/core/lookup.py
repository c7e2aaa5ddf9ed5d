"""Finding jobs: one, a page of them, and their places in the queue. Reads only."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, func, or_, select, text
from sqlalchemy.orm import Session

from api.core import paging, workers
from api.core.errors import NotFound
from api.core.models import Adapter, File, Job


@dataclass(frozen=True)
class Place:
    """Where a queued job stands, and why it is not running."""

    position: int
    reason: str


@dataclass(frozen=True)
class Result:
    """The adapter of a finished job and the file that holds it."""

    adapter: Adapter
    file: File


@dataclass(frozen=True)
class Sight:
    """A job with what other tables say about it: everything that a caller is shown."""

    job: Job
    place: Place | None
    result: Result | None


def find(session: Session, project_id: str, job_id: str) -> Job:
    """A job of this project, by the id in the path."""
    job = session.get(Job, job_id)
    if job is None or job.project_id != project_id:
        raise NotFound(f"Could not find fine tune: {job_id}", code="fine_tune_not_found", param="fine_tune_id")
    return job


def page(
    session: Session,
    project_id: str,
    *,
    after: str | None,
    limit: int,
    metadata: dict[str, str] | None = None,
    unlabelled: bool = False,
) -> tuple[Sequence[Job], bool]:
    """Newest first; True when there are more.

    Args:
        metadata: every pair must match exactly.
        unlabelled: only jobs without metadata.
    """
    query = select(Job).where(Job.project_id == project_id)
    dialect = session.get_bind().dialect.name
    for index, (key, value) in enumerate((metadata or {}).items()):
        query = query.where(_has(dialect, index, key, value))
    if unlabelled:
        query = query.where(Job.labels.is_(None))
    return paging.page(session, query, Job, project_id=project_id, after=after, limit=limit)


def _has(dialect: str, index: int, key: str, value: str) -> ColumnElement[bool]:
    # Any character may stand in a key, so it travels as a parameter and never inside a JSON path.
    k, v = f"k{index}", f"v{index}"
    if dialect == "postgresql":
        clause = text(f"jobs.metadata ->> CAST(:{k} AS text) = CAST(:{v} AS text)")
    else:
        clause = text(f"EXISTS (SELECT 1 FROM json_each(jobs.metadata) m WHERE m.key = :{k} AND m.value = :{v})")  # noqa: S608
    return clause.bindparams(**{k: key, v: value})  # type: ignore[return-value]


def sights(session: Session, found: Sequence[Job]) -> list[Sight]:
    """The jobs with their places and results, in two queries however many there are."""
    places = _places(session, [job for job in found if job.status == "queued"])
    results = _results(session, [job.id for job in found if job.status == "succeeded"])
    return [Sight(job, places.get(job.id), results.get(job.id)) for job in found]


def sight(session: Session, job: Job) -> Sight:
    """One job as a caller is shown it."""
    return sights(session, [job])[0]


def _places(session: Session, queued: Sequence[Job]) -> dict[str, Place]:
    if not queued:
        return {}
    # Polling one job is the commonest request of all: counting is ten times cheaper than numbering.
    positions = {queued[0].id: _position(session, queued[0])} if len(queued) == 1 else _positions(session, queued)
    return {job.id: Place(positions.get(job.id, 1), _reason(session, job, positions)) for job in queued}


def _position(session: Session, job: Job) -> int:
    same = Job.priority == job.priority
    ahead = or_(
        Job.priority > job.priority,
        and_(same, Job.created_at < job.created_at),
        and_(same, Job.created_at == job.created_at, Job.id < job.id),
    )
    return 1 + (session.scalar(select(func.count()).where(Job.status == "queued", ahead)) or 0)


def _positions(session: Session, queued: Sequence[Job]) -> dict[str, int]:
    order = (Job.priority.desc(), Job.created_at, Job.id)
    ranked = select(Job.id, func.row_number().over(order_by=order).label("place")).where(Job.status == "queued")
    numbered = ranked.subquery()
    ids = [job.id for job in queued]
    return {row.id: row.place for row in session.execute(select(numbered).where(numbered.c.id.in_(ids)))}


def _reason(session: Session, job: Job, positions: dict[str, int]) -> str:
    if job.attempts:
        return "restarting"
    if positions.get(job.id, 1) == 1 or workers.online(session) == 0:
        return "waiting_for_gpu"
    return "waiting_for_turn"


def _results(session: Session, job_ids: Iterable[str]) -> dict[str, Result]:
    ids = list(job_ids)
    if not ids:
        return {}
    rows = session.execute(
        select(Adapter, File).join(File, File.id == Adapter.file_id).where(Adapter.job_id.in_(ids))
    ).all()
    return {adapter.job_id: Result(adapter, file) for adapter, file in rows}
