"""Who is trained together with whom: chosen by project, priority, key and attempts, each with a token of its own."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from api.core.db.tables import Event, Job, Project
from api.core.jobs import admission, jobs
from api.core.jobs.jobs import Failure, Lease
from api.core.models import catalogue
from api.core.queue import groups, notify
from lorainit.config.model_facts import Target
from lorainit.config.spec import Hyperparameters, Lora
from tests.things import MODEL, a_job, a_project, a_queued_job, a_worker


def a_willing_job(session: Session, project: Project, *, group_key: str | None = "k", **changes: Any) -> Job:
    return a_queued_job(session, project, wants_group=True, group_key=group_key, **changes)


def claim(session: Session, size: int = 8) -> list[str]:
    return [job.id for job in jobs.claim(session, "w", lease_seconds=30, group_size=size)]


def lease_of(session: Session, job: Job) -> Lease:
    session.refresh(job)
    return Lease(job.id, job.lease_token)


# --- who ----------------------------------------------------------------------------------------


def test_jobs_that_ask_for_it_start_together_in_queue_order(session: Session) -> None:
    project = a_project(session)
    wanted = [a_willing_job(session, project).id for _ in range(3)]
    assert claim(session) == wanted
    assert claim(session) == []


def test_a_job_that_did_not_ask_runs_alone_and_is_left_alone(session: Session) -> None:
    project = a_project(session)
    plain, first = a_queued_job(session, project), a_willing_job(session, project)
    other, second = a_queued_job(session, project), a_willing_job(session, project)
    assert [claim(session) for _ in range(3)] == [[plain.id], [first.id, second.id], [other.id]]


def test_another_projects_job_does_not_join(session: Session) -> None:
    mine, theirs = (a_willing_job(session, a_project(session)).id for _ in range(2))
    assert [claim(session), claim(session)] == [[mine], [theirs]]


def test_a_job_with_another_key_does_not_join(session: Session) -> None:
    project = a_project(session)
    one, other = (a_willing_job(session, project, group_key=key).id for key in ("k", "other"))
    assert [claim(session), claim(session)] == [[one], [other]]


@pytest.mark.parametrize("priority", [0, 2])
def test_a_job_of_another_priority_does_not_join(session: Session, priority: int) -> None:
    project = a_project(session)
    alone = a_willing_job(session, project, priority=priority).id
    together = [a_willing_job(session, project, priority=1).id for _ in range(2)]
    assert sorted([claim(session), claim(session)]) == sorted([[alone], together])


def test_the_best_job_is_taken_whatever_group_waits_behind_it(session: Session) -> None:
    project = a_project(session)
    willing = [a_willing_job(session, project).id for _ in range(2)]
    urgent = a_queued_job(session, project, priority=1).id
    assert [claim(session), claim(session)] == [[urgent], willing]


def test_a_group_is_no_larger_than_allowed(session: Session) -> None:
    project = a_project(session)
    wanted = [a_willing_job(session, project).id for _ in range(5)]
    assert [claim(session, 3), claim(session, 3)] == [wanted[:3], wanted[3:]]


def test_a_size_of_one_switches_grouping_off(session: Session) -> None:
    project = a_project(session)
    first, second = (a_willing_job(session, project).id for _ in range(2))
    assert [claim(session, 1), claim(session, 1)] == [[first], [second]]


@pytest.mark.parametrize("older", ["the second attempt", "the first attempts"])
def test_a_second_attempt_runs_alone_and_joins_nobody(session: Session, older: str) -> None:
    project = a_project(session)
    tried = a_willing_job(session, project)
    assert claim(session) == [tried.id]
    assert jobs.retry_alone(session, lease_of(session, tried), "The process was killed")
    fresh = [a_willing_job(session, project).id for _ in range(2)]
    if older == "the first attempts":
        session.execute(update(Job).where(Job.id == tried.id).values(priority_time=Job.priority_time + 60))
    expected = [[tried.id], fresh] if older == "the second attempt" else [fresh, [tried.id]]
    assert [claim(session), claim(session)] == expected
    session.refresh(tried)
    assert (tried.attempts, tried.trained_with) == (2, [])


def test_a_job_given_back_costs_no_attempt_and_may_be_grouped_again(session: Session) -> None:
    project = a_project(session)
    drained = a_willing_job(session, project)
    claim(session)
    jobs.release(session, lease_of(session, drained), "The worker is shutting down")
    assert claim(session) == [drained.id]
    jobs.release(session, lease_of(session, drained), "The worker is shutting down")
    other = a_willing_job(session, project)
    assert claim(session) == [drained.id, other.id]


def test_only_queued_jobs_join(session: Session) -> None:
    project = a_project(session)
    first = a_willing_job(session, project)
    jobs.cancel(session, a_willing_job(session, project))
    a_job(session, project, wants_group=True, group_key="k")
    assert claim(session) == [first.id]


# --- what a claim leaves ------------------------------------------------------------------------


def test_each_member_has_a_token_a_lease_and_the_names_of_the_others(session: Session) -> None:
    project = a_project(session)
    members = [a_willing_job(session, project) for _ in range(3)]
    claim(session)
    for job in members:
        session.refresh(job)
        assert (job.status, job.lease_token, job.attempts, job.lease_owner) == ("running", 1, 1, "w")
        assert job.trained_with == [other.id for other in members if other.id != job.id]
    last = select(Event).where(Event.job_id == members[0].id).order_by(Event.sequence.desc()).limit(1)
    event = session.scalars(last).one()
    assert event.message == (f"Fine-tuning job started, trained together with {members[1].id}, {members[2].id}")
    assert event.data["trained_with"] == [members[1].id, members[2].id]


def test_a_job_alone_says_so(session: Session) -> None:
    job = a_willing_job(session, a_project(session))
    claim(session)
    session.refresh(job)
    assert job.trained_with == []
    event = session.scalars(select(Event).where(Event.job_id == job.id).order_by(Event.sequence.desc())).first()
    assert event is not None
    assert event.message == "Fine-tuning job started"


def test_a_lost_members_writes_are_refused_while_the_others_are_taken(session: Session) -> None:
    project = a_project(session)
    lost, kept = (a_willing_job(session, project) for _ in range(2))
    claim(session)
    leases = [lease_of(session, job) for job in (lost, kept)]
    jobs.cancel(session, lost)
    assert [jobs.update_run(session, lease, progress={"step": 1}) for lease in leases] == [False, True]
    assert [jobs.renew_lease(session, lease, lease_seconds=30) for lease in leases] == [False, True]
    assert [jobs.fail(session, lease, Failure("x", "y")) for lease in leases] == [False, True]


def test_the_leases_of_members_expire_independently(session: Session) -> None:
    project = a_project(session)
    silent, alive = (a_willing_job(session, project) for _ in range(2))
    claim(session)
    past = datetime.now(UTC) - timedelta(seconds=1)
    session.execute(update(Job).where(Job.id == silent.id).values(lease_until=past))
    assert jobs.recover_lost_runs(session, max_attempts=3) == [silent.id]
    session.refresh(alive)
    assert (alive.status, lease_of(session, silent).token) == ("running", 1)


def test_a_retry_costs_an_attempt_and_is_announced_again(session: Session) -> None:
    job = a_willing_job(session, a_project(session))
    claim(session)
    assert jobs.retry_alone(session, lease_of(session, job), "The process was killed")
    session.refresh(job)
    assert (job.status, job.attempts, job.notified_at, job.lease_until) == ("queued", 1, None, None)
    event = session.scalars(select(Event).where(Event.job_id == job.id).order_by(Event.sequence.desc())).first()
    assert event is not None
    told = "The process was killed; the job will be tried again alone"
    assert (event.level, event.message) == ("warn", told)


def test_jobs_trained_together_fill_one_slot(session: Session) -> None:
    project = a_project(session)
    for _ in range(3):
        a_willing_job(session, project)
    claim(session)
    waiting = a_queued_job(session, project)
    session.execute(
        update(Job).where(Job.id == waiting.id).values(notified_at=datetime.now(UTC) - timedelta(minutes=1))
    )
    a_worker(session, slots=2)
    assert notify.find_lost(session, older_than=timedelta(seconds=15)) == [(waiting.id, "train")]


# --- the key ------------------------------------------------------------------------------------

ONE = Target(name="q", group="attention", out_features=32, in_features=32, count=1)
BASE = catalogue.Entry(id="a", root="lab/a", source="s", max_length=64, chat=True, targets=[ONE], base_sha256="0" * 64)
LORA = Lora.model_validate({"init": "kaiming", "r": 8})
TRAINING = Hyperparameters(n_epochs=2, batch_size=8, max_length=32)


def key_of(
    base: catalogue.Entry = BASE,
    lora: Lora = LORA,
    *,
    training: Hyperparameters = TRAINING,
    deterministic: bool = True,
) -> str | None:
    return groups.compute_group_key(base, lora, training=training, deterministic=deterministic)


@pytest.mark.parametrize(
    "change",
    [
        {"base": BASE.model_copy(update={"id": "b"})},
        {"base": BASE.model_copy(update={"base_sha256": "1" * 64})},
        {"lora": LORA.model_copy(update={"quantization": "nf4"})},
        {"lora": LORA.model_copy(update={"use_dora": True})},
        {"training": TRAINING.model_copy(update={"batch_size": 16})},
        {"training": TRAINING.model_copy(update={"max_length": 64})},
        {"deterministic": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_forward_pass_cannot_share_changes_the_key(change: dict[str, Any]) -> None:
    assert key_of(**change) != key_of()


@pytest.mark.parametrize(
    "change",
    [
        {"lora": Lora.model_validate({"init": "pissa", "r": 4, "alpha": 3.0, "target_modules": ["q_proj"]})},
        {"training": TRAINING.model_copy(update={"n_epochs": 3, "learning_rate": 1e-3, "weight_decay": 0.1})},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_each_adapters_own_leaves_the_key(change: dict[str, Any]) -> None:
    assert key_of(**change) == key_of()


def test_adapters_of_experts_run_alone() -> None:
    facts = {"group": "mlp", "out_features": 8, "in_features": 8, "count": 4}
    targets = [
        Target.model_validate({"name": "experts.down_proj", "experts": True, **facts}),
        Target.model_validate({"name": "up_proj", **facts}),
    ]
    mixture = BASE.model_copy(update={"targets": targets})
    keys = [key_of(mixture, LORA.model_copy(update={"target_modules": [target.name]})) for target in targets]
    assert keys[0] is None and keys[1] is not None


def test_admission_gives_a_key_to_those_who_ask_and_an_auto_equals_its_number(session: Session) -> None:
    project = a_project(session)
    recipe = a_job(session, project).recipe
    numbers = {**recipe["training"], "batch_size": 8, "max_length": 2048}
    automatic = a_job(session, project, wants_group=True, recipe=recipe)
    exact = a_job(session, project, wants_group=True, recipe={**recipe, "training": numbers})
    plain = a_job(session, project)
    for job in (automatic, exact, plain):
        assert admission.consider(session, job.id) == "queued"
        session.refresh(job)
    assert automatic.recipe["training"]["batch_size"] == 8
    assert automatic.group_key == exact.group_key is not None
    assert len(automatic.group_key) == 64
    assert plain.group_key is None
    assert automatic.model == MODEL
