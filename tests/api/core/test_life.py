"""Two workers, a reconciler and a user who cancels, pauses and resumes, in any order: the rows are as the model says.

Every move is tried in every state and with stale tokens; what the model forbids must be refused and change nothing.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.core.db.tables import Adapter, Event, Job
from api.core.errors import Refusal
from api.core.jobs import checkpoints, jobs, pauses, transitions
from api.core.jobs.jobs import Failure, Lease
from api.core.queue import notify, positions, scheduling
from api.core.settings import get_settings
from tests.api.core.life import ATTEMPTS, LEASE, LIMIT, Life, next_up
from tests.things import a_file, a_job, a_project

pytestmark = pytest.mark.one_database
PLENTY = settings(
    max_examples=40,
    stateful_step_count=40,
    phases=[Phase.generate],  # shrinking an example takes minutes; the printed one is a plain program to rerun
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
ANY = st.integers(0, 5)
RECENT = st.sampled_from([0, 0, 0, 1, 1, 2, 3])  # counted from the last claim: the older ones are stale mostly
START = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    """The database's clock, which the test turns."""

    def __init__(self) -> None:
        self.at = START

    def __call__(self, _session: Session) -> datetime:
        self.at += timedelta(milliseconds=1)
        return self.at


class Lives(RuleBasedStateMachine):
    """Jobs of two projects, in the database and in the model."""

    def __init__(self, session: Session, clock: Clock) -> None:
        super().__init__()
        self.session, self.clock = session, clock
        clock.at = START
        self.savepoint = session.begin_nested()
        self.projects = {name: a_project(session) for name in ("ann", "bob")}
        self.file = a_file(session, self.projects["ann"])
        self.lives: dict[str, Life] = {}
        self.leases: list[Lease] = []

    def teardown(self) -> None:
        try:
            for job_id, life in self.lives.items():
                self._story_is_whole(job_id, life)
        finally:
            self.savepoint.rollback()
            self.session.expunge_all()

    @property
    def now(self) -> float:
        return self.clock.at.timestamp()

    def pick(self, number: int) -> tuple[Job, Life]:
        job_id = list(self.lives)[number % len(self.lives)]
        return self.session.get_one(Job, job_id, populate_existing=True), self.lives[job_id]

    @initialize(priorities=st.lists(st.integers(0, 2), min_size=4, max_size=4))
    def begin(self, priorities: list[int]) -> None:
        """Four jobs, three of which run and one of which its project's limit holds."""
        for number, priority in enumerate(priorities):
            self.order("ann" if number else "bob", priority)
            self.consider(number, 1)
        for worker in ("w1", "w2", "w1"):
            self.claim(worker)

    # --- the user -------------------------------------------------------------------------------

    @rule(name=st.sampled_from(["ann", "bob"]), priority=st.integers(0, 2))
    def order(self, name: str, priority: int) -> None:
        job = a_job(self.session, self.projects[name], file=self.file, priority=priority)
        self.lives[job.id] = Life(name, priority)

    @precondition(lambda self: self.lives)
    @rule(number=ANY, verb=st.sampled_from(["cancel", "pause", "resume", "resume"]))
    def ask(self, number: int, verb: str) -> None:
        job, life = self.pick(number)
        moves: dict[str, Callable[[Session, Job], Job]] = {
            "cancel": jobs.cancel, "pause": pauses.pause, "resume": pauses.resume,
        }  # fmt: skip
        code = None
        try:
            moves[verb](self.session, job)
        except Refusal as refusal:
            code = refusal.code
        assert code == (life.resume(self.now) if verb == "resume" else getattr(life, verb)())

    # --- the reconciler -------------------------------------------------------------------------

    @precondition(lambda self: self.lives)
    @rule(number=ANY, good=st.integers(0, 4))
    def consider(self, number: int, good: int) -> None:
        job, life = self.pick(number)
        expected = life.status == "validating_files"
        if good:
            assert jobs.admit(self.session, job.id, recipe=job.recipe, choices=[]) == expected
        else:
            assert jobs.reject(self.session, job.id, Failure("invalid_training_file", "No.")) == expected
        if expected and good:
            life.line_up(self.now)
        elif expected:
            life.leave("failed", "invalid_training_file")

    @rule(seconds=st.sampled_from([1, 12, 31, 5000]))
    def time_passes(self, seconds: int) -> None:
        self.clock.at += timedelta(seconds=seconds)

    @rule()
    def announce(self) -> None:
        for notification in notify.find_unannounced(self.session):
            assert not self.lives[notification.job_id].notified
            notify.mark_notified(self.session, notification.job_id)
            self.lives[notification.job_id].notified = True

    @rule()
    def recover(self) -> None:
        silent = [one for one in self.lives.values() if one.lease_until is not None and one.lease_until < self.now]
        jobs.recover_lost_runs(self.session, max_attempts=ATTEMPTS)
        for life in silent:
            life.lose(self.now)

    # --- the workers ----------------------------------------------------------------------------

    @rule(worker=st.sampled_from(["w1", "w2"]))
    def claim(self, worker: str) -> None:
        expected = next_up(self.lives, self.now)
        taken = jobs.claim(self.session, worker, lease_seconds=LEASE)
        assert [job.id for job in taken] == ([expected] if expected else [])
        for job in taken:
            self.lives[job.id].start(self.now)
            self.leases.append(Lease(job.id, job.lease_token))

    @precondition(lambda self: self.leases)
    @rule(number=RECENT, what=st.sampled_from(["beat", "note", "checkpoint"]))
    def work(self, number: int, what: str) -> None:
        lease = self.leases[-1 - number % len(self.leases)]
        life, held = self.lives[lease.job_id], self.lives[lease.job_id].held_by(lease.token)
        if what == "beat":
            assert jobs.renew_lease(self.session, lease, lease_seconds=LEASE) == held
            assert pauses.is_pause_requested(self.session, lease) == (held and life.asked)
            life.lease_until = self.now + LEASE if held else life.lease_until
        elif what == "note":
            assert jobs.update_run(self.session, lease, progress={"stage": "training"}) == held
        else:
            assert jobs.reset_lost_runs(self.session, lease) == held
            if held:
                self._save(lease, life)

    def _save(self, lease: Lease, life: Life) -> None:
        job = self.session.get_one(Job, lease.job_id, populate_existing=True)
        file = a_file(self.session, self.projects["ann"], purpose="fine-tune-results")
        checkpoints.add(self.session, job, step=1, metrics={}, file=file, state_key="s")
        life.lost_runs, life.saved = 0, True

    @precondition(lambda self: self.leases)
    @rule(number=RECENT, end=st.sampled_from(["succeed", "nan", "disk", "drain", "retry", "lose", "lose"]))
    def end(self, number: int, end: str) -> None:
        lease = self.leases[-1 - number % len(self.leases)]
        life, held = self.lives[lease.job_id], self.lives[lease.job_id].held_by(lease.token)
        moved = self._end(lease, end)
        if held:
            self._end_in_the_model(life, end)
        assert moved == (held and not (end == "lose" and life.status == "failed"))

    @rule(what=st.sampled_from(["lose", "lose", "checkpoint"]))
    def strike(self, what: str) -> None:
        """Luck, bad or good, comes to the job that has had most of the bad."""
        held = [one for one in self.leases if self.lives[one.job_id].held_by(one.token)]
        for lease in sorted(held, key=lambda one: self.lives[one.job_id].lost_runs)[-1:]:
            life = self.lives[lease.job_id]
            if what == "lose":
                jobs.requeue_lost_run(self.session, lease, "The process was killed", max_attempts=ATTEMPTS)
                life.lose(self.now)
            else:
                assert jobs.reset_lost_runs(self.session, lease)
                self._save(lease, life)

    def _end(self, lease: Lease, end: str) -> bool:
        if end == "succeed":
            return self._succeed(lease)
        if end in ("nan", "disk"):
            code = {"nan": "non_finite_loss", "disk": "disk_full"}[end]
            return jobs.fail(self.session, lease, Failure(code, "No."))
        if end == "lose":
            return jobs.requeue_lost_run(self.session, lease, "The process was killed", max_attempts=ATTEMPTS)
        return (jobs.release if end == "drain" else jobs.retry_alone)(self.session, lease, "Stopped")

    def _end_in_the_model(self, life: Life, end: str) -> None:
        if end == "lose":
            life.lose(self.now)
        elif end in ("drain", "retry"):
            life.attempts -= end == "drain"
            life.stop()
        elif end == "succeed":
            life.leave("succeeded")
        else:
            life.leave("failed", {"nan": "non_finite_loss", "disk": "disk_full"}[end])

    def _succeed(self, lease: Lease) -> bool:
        file = a_file(self.session, self.projects["ann"], purpose="fine-tune-results")
        project = self.projects[self.lives[lease.job_id].project]
        return jobs.succeed(
            self.session,
            lease,
            adapter=Adapter(job_id=lease.job_id, project_id=project.id, name=file.id, file_id=file.id, rank=8),
            files=[],
            result_file_id=None,
            trained_tokens=5,
            export_check={},
            resources={},
            progress={},
        )

    # --- what must hold -------------------------------------------------------------------------

    @invariant()
    def rows_are_as_the_model_says(self) -> None:
        rows = self.session.scalars(select(Job).execution_options(populate_existing=True)).all()
        assert {row.id: _seen(row) for row in rows} == {job_id: _wanted(life) for job_id, life in self.lives.items()}
        for row in rows:
            assert (row.lease_owner is not None) == (row.lease_until is not None) == (row.status == "running")
            assert (row.finished_at is not None) == self.lives[row.id].is_over
            assert row.priority_time == pytest.approx(self.lives[row.id].priority_time, abs=1)
            assert (row.notified_at is not None) == self.lives[row.id].notified

    @invariant()
    def nobody_runs_more_than_it_may(self) -> None:
        for name in self.projects:
            assert sum(one.project == name and one.status == "running" for one in self.lives.values()) <= LIMIT

    def _story_is_whole(self, job_id: str, life: Life) -> None:
        """Numbered without gaps, each status after the one before it, the last one the job's."""
        query = select(Event).where(Event.job_id == job_id).order_by(Event.sequence)
        story = self.session.scalars(query).all()
        assert [event.sequence for event in story] == list(range(1, len(story) + 1))
        told = [event.data for event in story if event.data.get("kind") == "status"]
        assert [data["previous"] for data in told] == [None, *(data["status"] for data in told[:-1])]
        assert told[-1]["status"] == life.shown


def _seen(row: Job) -> tuple[object, ...]:
    code = row.error["code"] if row.error else None
    return row.status, row.pause_requested, row.lease_token, row.attempts, row.lost_runs, code


def _wanted(life: Life) -> tuple[object, ...]:
    return life.status, life.asked, life.token, life.attempts, life.lost_runs, life.error


def test_any_order_of_moves_leaves_the_rows_as_the_model_says(
    session: Session, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("LORAINIT_PROJECT_RUNNING", str(LIMIT))
    get_settings.cache_clear()
    clock = Clock()
    for module in (jobs, transitions, scheduling, pauses, notify, positions, checkpoints):
        environment.setattr(module, "now", clock)
    run_state_machine_as_test(lambda: Lives(session, clock), settings=PLENTY)
