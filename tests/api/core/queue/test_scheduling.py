"""Whose turn it is: priority with ageing, projects in turn, limits, queues of workers, and what a caller is told."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from api.core.db.tables import Job
from api.core.errors import QuotaExceeded
from api.core.jobs import jobs, lookup
from api.core.jobs.jobs import Lease
from api.core.queue import notify, scheduling
from api.core.settings import get_settings
from tests.things import a_job, a_project, a_queued_job, a_running_job, a_worker

HOUR = 3600.0


def claim(session: Session, *queues: str, size: int = 1) -> list[str]:
    taken = jobs.claim(session, "w", lease_seconds=30, group_size=size, queues=queues or ("train",))
    return [job.id for job in taken]


def waited(session: Session, job: Job, seconds: float) -> Job:
    session.execute(update(Job).where(Job.id == job.id).values(priority_time=Job.priority_time - seconds))
    return job


def settings(environment: pytest.MonkeyPatch, **values: int) -> None:
    for name, value in values.items():
        environment.setenv(f"LORAINIT_{name.upper()}", str(value))
    get_settings.cache_clear()


def place(session: Session, job: Job) -> tuple[int, str]:
    session.refresh(job)
    found = lookup.load_view(session, job).position
    assert found is not None
    return found.position, found.reason


# --- order --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hours", "first"), [(1.9, "high"), (2.1, "low")])
def test_a_job_that_waited_an_hour_per_level_stands_before_a_higher_one(
    session: Session, hours: float, first: str
) -> None:
    project = a_project(session)
    ids = {"low": waited(session, a_queued_job(session, project, priority=0), hours * HOUR).id}
    ids["high"] = a_queued_job(session, project, priority=2).id
    assert claim(session) == [ids[first]]


def test_projects_take_turns_whoever_ordered_more(session: Session) -> None:
    many, few = a_project(session), a_project(session)
    crowd = [a_queued_job(session, many).id for _ in range(3)]
    pair = [a_queued_job(session, few).id for _ in range(2)]
    assert [claim(session)[0] for _ in range(5)] == [crowd[0], pair[0], crowd[1], pair[1], crowd[2]]


def test_the_project_that_runs_least_comes_first(session: Session) -> None:
    busy, idle = a_project(session), a_project(session)
    a_running_job(session, busy)
    a_queued_job(session, busy)
    late = a_queued_job(session, idle)
    assert claim(session) == [late.id]


def test_a_busy_projects_job_does_not_starve(session: Session) -> None:
    busy = a_project(session)
    a_running_job(session, busy)
    patient = waited(session, a_queued_job(session, busy), 1.1 * HOUR)
    for _ in range(3):
        a_queued_job(session, a_project(session))
    assert claim(session) == [patient.id]


def test_places_are_the_order_in_which_jobs_are_claimed(session: Session) -> None:
    projects = [a_project(session) for _ in range(3)]
    for number in range(9):
        waited(session, a_queued_job(session, projects[number * number % 3], priority=number % 2), number * 700.0)
    queued = session.query(Job).filter(Job.status == "queued").all()
    shown = sorted(
        (view.position.position, view.job.id) for view in lookup.load_views(session, queued) if view.position
    )
    assert [position for position, _ in shown] == list(range(1, 10))
    assert [claim(session)[0] for _ in range(9)] == [job_id for _, job_id in shown]


# --- limits -------------------------------------------------------------------------------------


def test_a_claim_passes_over_a_project_at_its_limit(session: Session, environment: pytest.MonkeyPatch) -> None:
    settings(environment, project_running=1)
    a_worker(session)
    full, other = a_project(session), a_project(session)
    _, lease = a_running_job(session, full)
    held, free = waited(session, a_queued_job(session, full), 9 * HOUR), a_queued_job(session, other)
    assert claim(session) == [free.id]
    assert claim(session) == []
    assert place(session, held) == (1, "project_limit_reached")
    assert jobs.release(session, lease, "Stopped")
    assert claim(session) != []


def test_a_group_is_no_larger_than_the_limit(session: Session, environment: pytest.MonkeyPatch) -> None:
    settings(environment, project_running=2)
    project = a_project(session)
    for _ in range(4):
        a_queued_job(session, project, wants_group=True, group_key="k")
    assert len(claim(session, size=8)) == 2
    assert claim(session, size=8) == []


def test_a_job_that_the_limit_holds_is_announced_once_it_may_run(
    session: Session, environment: pytest.MonkeyPatch
) -> None:
    settings(environment, project_running=1)
    project = a_project(session)
    first, second = a_queued_job(session, project), a_queued_job(session, project)
    assert notify.find_unannounced(session) == [(first.id, "train")]
    assert claim(session) == [first.id]
    assert notify.find_unannounced(session) == []
    assert notify.find_notification(session, second.id) is None
    jobs.cancel(session, first)
    assert notify.find_notification(session, second.id) == (second.id, "train")


def test_the_waiting_jobs_of_a_project_are_counted(session: Session, environment: pytest.MonkeyPatch) -> None:
    settings(environment, project_queued=2)
    project = a_project(session)
    a_running_job(session, project)
    a_job(session, project)
    scheduling.require_queue_quota(session, project.id)
    a_queued_job(session, project)
    with pytest.raises(QuotaExceeded, match="2 jobs of this project are waiting, and 2 may") as caught:
        scheduling.require_queue_quota(session, project.id)
    assert caught.value.code == "queue_full"
    scheduling.require_queue_quota(session, a_project(session).id)


# --- queues of workers ----------------------------------------------------------------------------


def test_a_worker_takes_only_jobs_of_its_queues(session: Session) -> None:
    project = a_project(session)
    gpu = a_queued_job(session, project, queue="gpu")
    plain = a_queued_job(session, project)
    assert claim(session, "cpu") == []
    assert claim(session, "train") == [plain.id]
    assert claim(session, "train", "gpu") == [gpu.id]


def test_jobs_of_another_queue_do_not_join_a_group(session: Session) -> None:
    project = a_project(session)
    first = a_queued_job(session, project, wants_group=True, group_key="k")
    a_queued_job(session, project, wants_group=True, group_key="k", queue="gpu")
    assert claim(session, "train", "gpu", size=8) == [first.id]


def test_a_job_that_no_worker_takes_says_so(session: Session) -> None:
    job = a_queued_job(session, a_project(session), queue="gpu")
    assert place(session, job) == (1, "no_worker_for_device")  # nobody is there at all
    a_worker(session)
    assert place(session, job) == (1, "no_worker_for_device")
    a_worker(session, queues=("cpu", "gpu"))
    assert place(session, job) == (1, "waiting_for_gpu")


def test_a_lost_message_is_rung_again_only_for_a_queue_that_somebody_serves(session: Session) -> None:
    project, past = a_project(session), datetime.now(UTC) - timedelta(minutes=1)
    a_queued_job(session, project, queue="gpu")
    plain = a_queued_job(session, project)
    session.execute(update(Job).values(notified_at=past))
    a_worker(session, slots=4)
    assert notify.find_lost(session, older_than=timedelta(seconds=15)) == [(plain.id, "train")]


def test_places_are_counted_within_a_queue(session: Session) -> None:
    project = a_project(session)
    a_queued_job(session, project)
    job = a_queued_job(session, project, queue="gpu")
    assert place(session, job)[0] == 1


# --- back-off -------------------------------------------------------------------------------------


def lose(session: Session, lease: Lease) -> Job:
    assert jobs.requeue_lost_run(session, lease, "The worker was lost", max_attempts=9)
    return session.get_one(Job, lease.job_id, populate_existing=True)


def wait_of(job: Job) -> float:
    assert job.not_before is not None
    return (job.not_before - datetime.now(UTC)).total_seconds()


def test_each_loss_after_the_first_waits_twice_as_long(session: Session) -> None:
    a_queued_job(session, a_project(session))
    waits = []
    for _ in range(8):
        (job,) = jobs.claim(session, "w", lease_seconds=30)
        waits.append(wait_of(lose(session, Lease(job.id, job.lease_token))))
        session.execute(update(Job).values(not_before=None))
    assert waits == pytest.approx([0, 10, 20, 40, 80, 160, 300, 300], abs=2)


def test_a_job_that_waits_after_a_loss_is_not_claimed_or_announced_before(session: Session) -> None:
    a_worker(session)
    _, lease = a_running_job(session, a_project(session))
    job = lose(session, lease)
    later = datetime.now(UTC) + timedelta(seconds=5)
    session.execute(update(Job).values(not_before=later))
    assert (claim(session), notify.find_unannounced(session)) == ([], [])
    assert place(session, job) == (1, "restarting")
    session.execute(update(Job).values(not_before=later - timedelta(seconds=6)))
    assert notify.find_unannounced(session) == [(job.id, "train")]
    assert claim(session) == [job.id]


def test_a_new_checkpoint_makes_earlier_losses_count_no_more(session: Session) -> None:
    job, lease = a_running_job(session, a_project(session))
    assert lose(session, lease).lost_runs == 1
    (again,) = jobs.claim(session, "w", lease_seconds=30)
    assert jobs.reset_lost_runs(session, Lease(again.id, again.lease_token))
    assert not jobs.reset_lost_runs(session, lease)
    session.refresh(job)
    assert job.lost_runs == 0


def test_a_lost_job_keeps_its_place(session: Session) -> None:
    project = a_project(session)
    job, lease = a_running_job(session, project)
    a_queued_job(session, project)
    lose(session, lease)
    assert claim(session) == [job.id]
