"""Downloads a run's files and its last checkpoint, and uploads its adapter and checkpoints.

Bytes are uploaded before their row is written, so that no row is without its bytes. Every key contains the fencing
token, so that a run that has lost its job cannot overwrite what the next run stored.
"""

import shutil
import time
from pathlib import Path
from typing import Any

from api.core.db.database import now, session_scope
from api.core.db.tables import Adapter, File, Job
from api.core.files.storage import Storage
from api.core.jobs import checkpoints, events, jobs, metrics
from api.core.jobs.jobs import Lease
from api.core.models import catalogue
from api.core.settings import get_settings
from lorainit.config.events import Checkpoint, Done
from lorainit.config.resolve import with_base_rate
from lorainit.config.spec import Data, Hyperparameters, Lora, RunSpec
from worker.host import disk_space
from worker.job.archive import Archive, pack, unpack
from worker.job.progress import LeaseLost

TIMES = ("stage_seconds", "seconds_to_first_step")  # of a job's progress, kept when it is over


def prepare(job: Job, lease: Lease, folder: Path, storage: Storage) -> Path:
    """Fetch a job's files and its last checkpoint; write `spec.json` and return its path.

    Raises:
        LeaseLost: the job is not ours any more.
        WaitForDiskSpace: there is too little disk space at the moment.
        DoesNotFit: there is too little even on empty disks.
    """
    with session_scope(read_only=True) as session:
        training = session.get_one(File, job.training_file_id)
        validation = session.get(File, job.validation_file_id) if job.validation_file_id else None
        calibration = session.get(File, job.calibration_file_id) if job.calibration_file_id else None
        checkpoint = checkpoints.find_latest(session, job.id)
    rows = [file for file in (training, validation, calibration) if file is not None]
    disk_space.reserve_for_job(job, data_bytes=sum(file.bytes for file in rows), folder=folder)
    data = Data(
        training=str(_fetch(storage, training.storage_key, folder / "training.jsonl")),
        validation=str(_fetch(storage, validation.storage_key, folder / "validation.jsonl")) if validation else None,
        calibration=str(_fetch(storage, calibration.storage_key, folder / "calibration.jsonl"))
        if calibration
        else None,
        on_row_error="skip" if job.on_row_error == "skip" else "fail",
        append_eos=job.append_eos,
        owner=job.project_id,
    )
    resume = None
    if checkpoint is not None:
        unpack(_fetch(storage, checkpoint.state_key, folder / "state.tar"), folder / "resume")
        resume = str(folder / "resume")
    with session_scope() as session:
        # The lease is checked first, because a worker that was frozen must not delete what the next run has logged.
        if not jobs.update_run(session, lease):
            raise LeaseLost
        metrics.delete_after(session, job.id, checkpoint.step if checkpoint else 0)
        session.commit()
    lora, recipe = Lora.model_validate(job.recipe["lora"]), Hyperparameters.model_validate(job.recipe["training"])
    spec = RunSpec(
        model=with_base_rate(catalogue.require(job.model).reference(), recipe, lora.method),
        data=data,
        lora=lora,
        training=recipe,
        seed=job.seed,
        deterministic=job.deterministic,
        devices=job.devices,
        cache=str(get_settings().models()),
        cache_limit_bytes=get_settings().init_cache_bytes,
        resume_from=resume,
        stop_after=job.stop_after,
    )
    path = folder / "spec.json"
    path.write_text(spec.model_dump_json(indent=2))
    return path


def store_checkpoint(job: Job, lease: Lease, event: Checkpoint, folder: Path, storage: Storage) -> None:
    """Upload a checkpoint's adapter and state, then write its row and mark old ones deleted.

    The reconciler removes the bytes of old ones (`worker.maintenance.janitor`), so that a crash between rows and bytes
    leaves nothing behind. The child's copy is removed here, because many would fill its disk.

    Raises:
        LeaseLost: the job is not ours any more.
    """
    at = int(time.time())
    source, prefix = Path(event.path), f"jobs/{job.id}/attempt-{lease.token}/step-{event.step}"
    adapter = pack(source / "adapter", folder / "checkpoint.tar", mtime=at)
    state = pack(source, folder / "state.tar", mtime=at)
    for archive, key in ((adapter, f"{prefix}/adapter.tar"), (state, f"{prefix}/state.tar")):
        storage.put(key, archive.path)
    with session_scope() as session:
        if not jobs.reset_lost_runs(session, lease):
            raise LeaseLost
        file = _row(session, job, f"{job.id}-step-{event.step}.tar", f"{prefix}/adapter.tar", adapter)
        row = checkpoints.add(
            session, job, step=event.step, metrics=event.metrics, file=file, state_key=f"{prefix}/state.tar"
        )
        events.append(
            session,
            job.id,
            f"Checkpoint created at step {event.step}: {row.name}",
            at=now(session),
            data={"kind": "checkpoint", "step": event.step},
        )
        checkpoints.supersede(session, job.id, keep=get_settings().keep_checkpoints)
        session.commit()
    shutil.rmtree(source, ignore_errors=True)


def store_result(job: Job, lease: Lease, done: Done, folder: Path, storage: Storage, progress: dict[str, Any]) -> None:
    """Upload the adapter and the metrics, then write all rows and `succeeded` in one transaction.

    Raises:
        LeaseLost: the job is not ours any more.
    """
    archive = pack(Path(done.adapter), folder / "adapter.tar", mtime=int(time.time()))
    key = f"jobs/{job.id}/attempt-{lease.token}/adapter.tar"
    storage.put(key, archive.path)
    # A session of its own, because `store_csv` rolls back before its upload.
    with session_scope(read_only=True) as session:
        result = metrics.store_csv(session, storage, job)
    with session_scope() as session:
        file = _row(session, job, f"{job.id}.tar", key, archive)
        moved = jobs.succeed(
            session,
            lease,
            adapter=_adapter(job, file, done),
            files=[file, *([result] if result else [])],
            result_file_id=result.id if result else None,
            trained_tokens=done.trained_tokens,
            export_check={**done.export_check, "adapter_sha256": archive.sha256},
            resources={**done.resources, "attempts": job.attempts, **{name: progress[name] for name in TIMES}},
            warnings=[found.model_dump(mode="json") for found in done.warnings],
            progress={**progress, "stage": "done", "percent": 100.0, "remaining_seconds": 0},
        )
        if not moved:
            raise LeaseLost
        session.commit()


def _adapter(job: Job, file: File, done: Done) -> Adapter:
    return Adapter(
        job_id=job.id,
        project_id=job.project_id,
        name=checkpoints.model_name(job),
        file_id=file.id,
        rank=int(done.export_check["export_rank"]),
        deleted_at=None,
        deleted_by=None,
    )


def _row(session: Any, job: Job, filename: str, key: str, archive: Archive) -> File:
    return metrics.make_result_file(
        session, job.project_id, filename=filename, key=key, size=archive.size, sha256=archive.sha256
    )


def _fetch(storage: Storage, key: str, path: Path) -> Path:
    with path.open("wb") as file:
        for chunk in storage.read(key):
            file.write(chunk)
    return path
