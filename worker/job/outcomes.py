"""The ends of a run without an adapter, for one job. Each is a short fenced transaction that is safe to repeat."""

import errno

from api.core.db.database import session_scope
from api.core.db.tables import File, Job
from api.core.errors import BadReference
from api.core.fields import translate_field
from api.core.files import disk
from api.core.files.disk import format_bytes
from api.core.files.storage import get_storage
from api.core.jobs import jobs, metrics
from api.core.jobs.jobs import Failure, Lease
from api.core.logs import get_logger
from api.core.settings import get_settings
from lorainit.config.events import Failed
from lorainit.system import shared_memory
from lorainit.system.host_failure import is_host_failure
from worker.child.supervisor import Outcome
from worker.job.progress import LeaseLost
from worker.job.retry import TRANSIENT

EXIT_LEASE_LOST = 75  # the child's exit code when none of its leases is valid any more
EXIT_WRONG_SPEC = 2  # and when it cannot read its spec, which is an error of ours
DISK_FULL, DEVICE_FAILED = "disk_full", "device_failed"
# Errors that are not the job's fault, so that it is tried again, a limited number of times.
RETRIED_CODES = ("hub_unavailable", "worker_lost", DEVICE_FAILED)
INTERNAL = Failure("internal_error", "The worker failed while handling this job; see its log.")
OUT_OF_MEMORY = Failure(
    "out_of_memory",
    "Memory ran out, and the training process was ended. Try a smaller max_length or batch, or a smaller model.",
)

log = get_logger(__name__)


def end_as_reported(job: Job, lease: Lease, failed: Failed) -> None:
    """The child reported why the job failed. If it shared its process with others, they may be the cause."""
    # Without its message, because that may quote rows, and logs are kept.
    log.error("the run failed", code=failed.code, param=failed.param)
    if failed.code == OUT_OF_MEMORY.code and _may_retry_alone(job):
        _retry(lease, "ran out of memory")
    elif failed.code == DEVICE_FAILED and _may_retry_alone(job):
        _retry(lease, "lost its GPU")
    elif failed.code in RETRIED_CODES or failed.may_pass:
        requeue_lost_run(lease, failed.message.rstrip("."), code=failed.code)
    else:
        figures = f" {_describe_free_space()}" if failed.code == DISK_FULL else ""
        fail(lease, Failure(failed.code, failed.message + figures, translate_field(failed.param)))


def halt(lease: Lease, step: int) -> None:
    """`paused` at the step at which the job was to wait for its experiment's decision."""
    with session_scope() as session:
        if jobs.halt(session, lease, step):
            log.info("halted", step=step)
        session.commit()


def end_without_report(job: Job, lease: Lease, outcome: Outcome, reason: str) -> None:
    """The child ended and reported nothing about the job.

    Args:
        reason: why we stopped the child, if we did.

    Raises:
        LeaseLost: the child found its lease expired; the job belongs to another run or is cancelled.
    """
    if outcome.stopped:
        _release(lease, reason)
    elif outcome.returncode == EXIT_LEASE_LOST:
        raise LeaseLost
    elif _may_retry_alone(job):
        _retry(lease, _describe(outcome))
    elif outcome.has_run_out_of_memory:
        fail(lease, OUT_OF_MEMORY)
    elif outcome.returncode == EXIT_WRONG_SPEC:
        fail(lease, Failure("internal_error", f"The training process {_describe(outcome)}."))
    else:  # like a crash, because libraries exit with any code when a device fails: bitsandbytes with 1
        requeue_lost_run(lease, f"The training process {_describe(outcome)}")


def fail(lease: Lease, failure: Failure) -> None:
    """`failed`, with the steps that were logged as the result file."""
    file = _store_results(lease)  # before the transaction, because an upload may take long
    with session_scope() as session:
        if file is not None:
            session.add(file)
            session.flush()
        if jobs.fail(session, lease, failure, result_file_id=file.id if file else None):
            session.commit()


def requeue_lost_run(lease: Lease, how: str, *, code: str = "worker_lost") -> None:
    """Try the job again from its last checkpoint; it fails after too many such runs without a new one."""
    with session_scope() as session:
        again = jobs.requeue_lost_run(session, lease, how, max_attempts=get_settings().max_attempts, code=code)
        session.commit()
    log.warning("the run was lost", how=how, again=again)


def requeue_for_disk_space(lease: Lease, reason: str) -> None:
    """Back to the queue, without counting an attempt, because this host has too little disk space now."""
    with session_scope() as session:
        if jobs.release(session, lease, reason.rstrip(".")):
            log.warning("too little disk space", reason=reason)
        session.commit()


def end_after_worker_error(lease: Lease, error: Exception) -> None:
    """The worker itself could not go on, because of its disks, a dependency, or a bug."""
    if shared_memory.is_full(error):  # for example the shared memory of the database
        requeue_lost_run(lease, shared_memory.FULL.rstrip("."))
    elif isinstance(error, TRANSIENT) and not disk.is_full(error):
        # It has been tried for ten minutes, and another worker may reach them.
        requeue_lost_run(lease, "The worker could not reach the database or the storage")
    elif is_host_failure(error) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        requeue_lost_run(lease, f"The worker's host failed: {getattr(error, 'strerror', None) or error}")
    else:
        fail(lease, make_failure(error))


def make_failure(error: BaseException) -> Failure:
    """The error of a job when the worker itself could not go on."""
    if isinstance(error, BadReference):  # the base has left the catalogue since the job was accepted
        return Failure("unsupported_model", error.message, error.param)
    if not disk.is_full(error):
        return INTERNAL
    volumes = disk.list_worker_volumes(get_settings())
    volume = disk.find_volume_of(error, volumes)
    where = f"the worker's volume of {volume.name}" if volume else "a volume of the worker or of storage"
    return Failure(DISK_FULL, f"No space was left on {where}. {_describe_free_space()}")


def _describe_free_space() -> str:
    """Free space of each volume, for the person who has to free some."""
    free = [f"{volume.name} {format_bytes(volume.free)}" for volume in disk.list_worker_volumes(get_settings())]
    return f"Free now: {', '.join(free)}."


def _store_results(lease: Lease) -> File | None:
    try:
        with session_scope(read_only=True) as session:
            return metrics.store_csv(session, get_storage(), session.get_one(Job, lease.job_id))
    except Exception as error:
        if not disk.is_full(error):
            raise
        log.warning("no disk space for the result file; the reconciler writes it later", error=str(error))
        return None


def _may_retry_alone(job: Job) -> bool:
    """Whether to try the job alone, because another job of its run may have ended the process."""
    return bool(job.trained_with) and job.attempts < get_settings().max_attempts


def _retry(lease: Lease, what: str) -> None:
    reason = f"The process that trained this job together with others {what}"
    with session_scope() as session:
        if jobs.retry_alone(session, lease, reason):
            log.warning("to be tried alone", reason=what)
        session.commit()


def _release(lease: Lease, reason: str) -> None:
    with session_scope() as session:
        if jobs.release(session, lease, reason):
            log.info("released", reason=reason)
        session.commit()


def _describe(outcome: Outcome) -> str:
    if outcome.crash == "SIGBUS":  # a write to a memory-mapped file whose disk is full
        return f"crashed (SIGBUS); a full /dev/shm is the usual cause ({shared_memory.MORE})"
    if outcome.crash:
        return f"crashed ({outcome.crash})"
    if outcome.hangs:
        return "did nothing for too long (LORAINIT_SILENCE_SECONDS) and was ended, because a device or its driver hangs"
    code = outcome.returncode
    return f"was killed (signal {-code})" if code < 0 else f"ended with exit code {code} and reported nothing"
