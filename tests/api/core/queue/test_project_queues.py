"""Claims, notifications and positions beside their rule, as the documentation says it and worked out over every row."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from itertools import groupby
from random import Random
from typing import NamedTuple

import pytest
from sqlalchemy import insert, inspect, select, update
from sqlalchemy.orm import Session

from api.core.db.database import now, session_scope
from api.core.db.tables import Job
from api.core.ids import new_id
from api.core.jobs import jobs
from api.core.queue import notify, positions, scheduling
from api.core.settings import get_settings
from tests.things import a_project, a_queued_job, a_worker

STEP = 3600.0
QUEUES = ("cpu", "gpu", "train")
LIMITS = (0, 4)


class Due(NamedTuple):
    """A waiting job as the rule sees it."""

    due: float
    job_id: str
    slot: int


def in_order(rows: Iterable[Job], *, at: datetime | None, queues: Sequence[str] = QUEUES) -> list[Due]:
    """Waiting jobs of these queues by when they are due, a slot for each that its project runs or has before it.

    Args:
        at: leave out those that wait for a back-off then; None leaves out nobody.
    """
    rows = list(rows)
    waiting = [
        row
        for row in rows
        if row.status == "queued"
        and row.queue in queues
        and (at is None or row.not_before is None or row.not_before <= at)
    ]
    waiting.sort(key=lambda row: (row.queue, row.project_id, row.priority_time, row.id))
    found = []
    for (_, project_id), line in groupby(waiting, key=lambda row: (row.queue, row.project_id)):
        running = sum(row.project_id == project_id and row.status == "running" for row in rows)
        for slot, row in enumerate(line, start=running + 1):
            assert row.priority_time is not None
            found.append(Due(row.priority_time + STEP * slot, row.id, slot))
    return sorted(found)


def everything(session: Session) -> Sequence[Job]:
    return session.scalars(select(Job).execution_options(populate_existing=True)).all()


def allowed(due: Due, limit: int) -> bool:
    return not limit or due.slot <= limit


def a_crowd(session: Session, chance: Random, *, size: int = 40) -> None:
    """Jobs of some projects in three queues: many of equal turn, some that wait for a back-off, some that run."""
    projects = [a_project(session) for _ in range(4)]
    one = a_queued_job(session, projects[0])
    common = {column.key: getattr(one, column.key) for column in inspect(Job).column_attrs}
    session.execute(update(Job).values(priority_time=1e12))  # the last of all
    start = datetime.now(UTC)
    rows = []
    for _ in range(size):
        row = {**common, "id": new_id("ftjob-"), "project_id": chance.choice(projects).id}
        row |= {"queue": chance.choice(QUEUES), "priority_time": 1e9 + STEP / 2 * chance.randrange(8)}
        row["not_before"] = start + timedelta(hours=chance.choice([-1, 1])) if chance.random() < 0.3 else None
        row["notified_at"] = start - timedelta(hours=1) if chance.random() < 0.5 else None
        if chance.random() < 0.1:  # wherever it stood
            row |= {"status": "running", "lease_token": 1, "lease_until": start, "lease_owner": "elsewhere"}
        rows.append(row)
    session.execute(insert(Job), rows)


@pytest.fixture(params=LIMITS)
def limit(request: pytest.FixtureRequest, environment: pytest.MonkeyPatch) -> Iterator[int]:
    environment.setenv("LORAINIT_PROJECT_RUNNING", str(request.param))
    get_settings.cache_clear()
    yield request.param
    get_settings.cache_clear()


@pytest.mark.parametrize("seed", range(3))
def test_every_claim_takes_the_job_that_the_rule_names(session: Session, limit: int, seed: int) -> None:
    chance = Random(seed)
    a_crowd(session, chance)
    taken = 0
    for _ in range(25):
        queues = chance.choice([QUEUES, ("train",), ("gpu", "cpu")])
        ordered = in_order(everything(session), at=now(session), queues=queues)
        expected = [due.job_id for due in ordered if allowed(due, limit)][:1]
        assert [job.id for job in jobs.claim(session, "w", lease_seconds=30, queues=queues)] == expected
        taken += len(expected)
    assert taken > 2


@pytest.mark.parametrize(("seed", "most"), [(0, 1), (1, 6), (2, 100)])
def test_every_place_is_the_one_that_the_rule_gives(
    session: Session, limit: int, seed: int, most: int, environment: pytest.MonkeyPatch
) -> None:
    environment.setattr(positions, "MOST", most)
    a_crowd(session, Random(seed))
    a_worker(session, queues=QUEUES)
    rows = everything(session)
    shown = positions.find_positions(session, [row for row in rows if row.status == "queued"])
    for queue in QUEUES:
        ordered = in_order(rows, at=None, queues=[queue])
        assert [shown[due.job_id].position for due in ordered] == [
            min(number, most + 1) for number in range(1, len(ordered) + 1)
        ]
        held = {due.job_id for due in ordered if not allowed(due, limit)}
        assert scheduling.find_held_back(session, [due.job_id for due in ordered]) == held
        told = {job_id for job_id, place in shown.items() if place.reason == "project_limit_reached"}
        restarting = {job_id for job_id, place in shown.items() if place.reason == "restarting"}
        assert {due.job_id for due in ordered} & told == held - restarting


@pytest.mark.parametrize("seed", range(2))
def test_workers_are_notified_of_all_that_could_start_and_of_no_other(session: Session, limit: int, seed: int) -> None:
    a_crowd(session, Random(seed))
    rows = {row.id: row for row in everything(session)}
    startable = {due.job_id for due in in_order(rows.values(), at=now(session)) if allowed(due, limit)}
    wanted = {job_id for job_id in startable if rows[job_id].notified_at is None}
    assert wanted
    assert {notification.job_id for notification in notify.find_unannounced(session)} == wanted
    assert {job_id for job_id in rows if notify.find_notification(session, job_id)} == wanted
    for notification in notify.find_unannounced(session):
        assert notification.queue == rows[notification.job_id].queue


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)  # SQLite lets one transaction write at a time
def test_claims_at_once_take_the_jobs_in_their_order(service: None) -> None:
    """Several transactions that have not ended: each passes over what the others took, and over nothing else."""
    with session_scope() as session:
        a_crowd(session, Random(1), size=14)
        session.commit()
    with session_scope() as session:
        expected = [due.job_id for due in in_order(everything(session), at=now(session))]
    taken = []
    with ExitStack() as open_transactions:
        for _ in range(len(expected) + 1):
            session = open_transactions.enter_context(session_scope())
            taken += [job.id for job in jobs.claim(session, "w", lease_seconds=30, queues=QUEUES)]
    assert len(expected) > 6
    assert taken == expected
