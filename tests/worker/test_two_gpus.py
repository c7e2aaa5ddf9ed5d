"""A real worker with two slots, a GPU to each, of which one fails: the other goes on, and both are back in the end."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from api.core.db.database import session_scope
from api.core.db.tables import Job, Project
from api.core.files.storage import get_storage
from api.core.queue import workers
from tests import servers
from tests.conftest import forget
from tests.stack import QUIET, wait_for
from tests.things import a_file, a_project, a_queued_job

WORKER = ["-m", "celery", "-A", "tests.worker.two_gpus", "worker"]


def order(project_id: str) -> str:
    with session_scope() as session:
        project = session.get_one(Project, project_id)
        file = a_file(session, project)
        get_storage().put(file.storage_key, iter([b"{}\n"]))
        job = a_queued_job(session, project, file=file).id
        session.commit()
        return job


def job(job_id: str) -> Job:
    with session_scope() as session:
        return session.get_one(Job, job_id)


def have_succeeded(job_ids: Sequence[str]) -> bool:
    found = [job(job_id) for job_id in job_ids]
    assert all(one.status != "failed" for one in found), [one.error for one in found]
    return all(one.status == "succeeded" for one in found)


def troubles() -> list[str]:
    with session_scope(read_only=True) as session:
        return list(workers.find_problems(session).values())


def free_slots() -> int:
    with session_scope(read_only=True) as session:
        return workers.count_free_slots(session, running=0)


@pytest.mark.slow
@pytest.mark.usefixtures("service")
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_slot_whose_gpu_fails_rests_while_the_other_goes_on(
    environment: pytest.MonkeyPatch, valkey_url: str, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    settings = {"BROKER_URL": valkey_url, "WORKER_SLOTS": "2", "RETRY_SECONDS": "0", "KEEP_WARM": "false"}
    for name, value in settings.items():
        environment.setenv(f"LORAINIT_{name}", value)
    environment.setenv("PRETENDED_BROKEN", str(broken))
    forget()
    with session_scope() as session:
        project = a_project(session).id
        session.commit()
    processes = [
        servers.spawn([sys.executable, *program], log=tmp_path / "log")
        for program in ([*WORKER, *QUIET], ["-m", "worker.reconciler"])
    ]
    try:
        wait_for(lambda: free_slots() == 2)
        ordered = list[str]()
        while not (found := troubles()):
            ordered += [order(project), order(project)]  # at once, so that each slot has one
            wait_for(partial(have_succeeded, ordered[-2:]))
        assert found[0].startswith(("device_failed of", "It is still broken."))
        wait_for(lambda: free_slots() == 1)
        ordered += [order(project) for _ in range(5)]
        wait_for(partial(have_succeeded, ordered))
        assert sum(job(one).attempts - 1 for one in ordered) == 1, "one run met the broken GPU, and no other after it"
        broken.unlink()
        wait_for(lambda: not troubles() and free_slots() == 2)
    finally:
        for process in processes:
            servers.stopped(process, servers.signal.SIGTERM)
