"""What a run is handed: its files, and the spec that names them."""

from pathlib import Path

from sqlalchemy.orm import Session

from api.core import jobs
from api.core.storage import get_storage
from lorainit.spec import Hyperparameters, Lora, RunSpec
from tests.things import a_file, a_job, a_project
from worker import artifacts


def test_the_calibration_file_is_fetched_beside_the_training_file(session: Session, tmp_path: Path) -> None:
    project, storage = a_project(session), get_storage()
    rows, training = a_file(session, project), a_file(session, project)
    for file, content in ((rows, b"calibration"), (training, b"training")):
        storage.put(file.storage_key, iter([content]))
    init = {"method": "lora_one", "calibration_file": rows.id}
    lora, _ = Lora.model_validate({"init": init, "target_modules": ["q_proj"]}).resolved()
    recipe = {"lora": lora.model_dump(mode="json"), "training": Hyperparameters().model_dump(mode="json")}
    job = a_job(session, project, file=training, recipe=recipe)
    jobs.admit(session, job.id, recipe=recipe, choices=[])
    session.commit()
    spec = RunSpec.model_validate_json(artifacts.prepare(job, tmp_path, storage).read_text())
    assert spec.data.calibration is not None
    assert Path(spec.data.calibration).read_bytes() == b"calibration"
    assert Path(spec.data.training).read_bytes() == b"training"
    assert spec.cache_limit_bytes == 8 * 2**30


def test_without_a_calibration_file_none_is_named(session: Session, tmp_path: Path) -> None:
    project, storage = a_project(session), get_storage()
    training = a_file(session, project)
    storage.put(training.storage_key, iter([b"training"]))
    job = a_job(session, project, file=training)
    session.commit()
    spec = RunSpec.model_validate_json(artifacts.prepare(job, tmp_path, storage).read_text())
    assert spec.data.calibration is None
