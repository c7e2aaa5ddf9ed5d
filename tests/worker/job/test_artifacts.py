"""What a run is handed: its files, and the spec that names them."""

from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from api.core.files.storage import get_storage
from api.core.jobs import jobs, metrics
from api.core.jobs.jobs import Lease
from lorainit.config.spec import Hyperparameters, Lora, RunSpec
from tests.things import a_file, a_job, a_project, a_queued_job, a_running_job
from worker.job import artifacts
from worker.job.progress import LeaseLost


def test_the_calibration_file_is_fetched_beside_the_training_file(session: Session, tmp_path: Path) -> None:
    project, storage = a_project(session), get_storage()
    rows, training = a_file(session, project), a_file(session, project)
    for file, content in ((rows, b"calibration"), (training, b"training")):
        storage.put(file.storage_key, iter([content]))
    init = {"method": "lora_one", "calibration_file": rows.id}
    lora, _ = Lora.model_validate({"init": init, "target_modules": ["q_proj"]}).resolve()
    recipe = {"lora": lora.model_dump(mode="json"), "training": Hyperparameters().model_dump(mode="json")}
    job = a_job(session, project, file=training, recipe=recipe)
    jobs.admit(session, job.id, recipe=recipe, choices=[])
    spec = _prepared(session, tmp_path)
    assert spec.data.calibration is not None
    assert Path(spec.data.calibration).read_bytes() == b"calibration"
    assert Path(spec.data.training).read_bytes() == b"training"
    assert spec.cache_limit_bytes == 8 * 2**30


def test_without_a_calibration_file_none_is_named(session: Session, tmp_path: Path) -> None:
    project, storage = a_project(session), get_storage()
    training = a_file(session, project)
    storage.put(training.storage_key, iter([b"training"]))
    a_queued_job(session, project, file=training)
    assert _prepared(session, tmp_path).data.calibration is None


def test_a_worker_that_slept_since_its_claim_deletes_nothing_of_its_successors(
    session: Session, tmp_path: Path
) -> None:
    project, storage = a_project(session), get_storage()
    training = a_file(session, project)
    storage.put(training.storage_key, iter([b"training"]))
    job, first = a_running_job(session, project, file=training)
    assert jobs.release(session, first, "lost")
    (second,) = jobs.claim(session, "worker:2", lease_seconds=30)
    metrics.save_steps(session, job.id, second.lease_token, [(1, {"train_loss": 2.0})], at=job.created_at)
    session.commit()
    with pytest.raises(LeaseLost):
        artifacts.prepare(job, first, tmp_path, storage)
    assert [row["step"] for row in metrics.read(session, job.id)] == [1]


def _prepared(session: Session, folder: Path) -> RunSpec:
    """What the next queued job's run is told to do."""
    (job,) = jobs.claim(session, "worker:1", lease_seconds=30)
    session.commit()
    lease = Lease(job.id, job.lease_token)
    return RunSpec.model_validate_json(artifacts.prepare(job, lease, folder, get_storage()).read_text())


def test_an_end_token_that_was_asked_for_reaches_the_run(session: Session, tmp_path: Path) -> None:
    project = a_project(session)
    training = a_file(session, project)
    get_storage().put(training.storage_key, iter([b"training"]))
    a_queued_job(session, project, file=training, append_eos=True)
    session.commit()
    assert _prepared(session, tmp_path).data.append_eos is True
