"""How a run ends for one job when no adapter comes of it: each a short fenced transaction, safe to repeat."""

from api.core import jobs, metrics
from api.core.db import session_scope
from api.core.jobs import Failure, Lease
from api.core.logs import get_logger
from api.core.models import Job
from api.core.settings import get_settings
from api.core.storage import get_storage
from lorainit.events import Failed
from worker.progress import Lost
from worker.supervisor import Outcome

LEASE_LOST = 75  # how the child leaves when no lease holds any more
INTERNAL = Failure("internal_error", "The worker failed while handling this job; see its log.")
KILLED = Failure(
    "out_of_memory",
    "The training process was killed (signal 9), which is what the system does when memory runs out. "
    "Try a smaller max_length or batch, or a smaller model.",
)
_COMPANY = "The process that trained this job together with others"

log = get_logger(__name__)


def told(job: Job, lease: Lease, failed: Failed) -> None:
    """The child said why the job failed. A shared process that ran out of memory is no verdict on one job."""
    log.error("the run failed", code=failed.code, message=failed.message)
    if failed.code == KILLED.code and _may_try_alone(job):
        _retry(lease, f"{_COMPANY} ran out of memory; the job will be tried again alone")
    else:
        fail(lease, Failure(failed.code, failed.message, failed.param))


def silent(job: Job, lease: Lease, outcome: Outcome) -> None:
    """The child ended without a word about the job.

    A kill that was not the system's, for want of memory, is a lost worker's: the job goes on from its last
    checkpoint. Where the system does not say whose kill it was, it is one too, and the attempts run out.

    Raises:
        Lost: it saw no lease that held; whoever has the job now decides.
    """
    if outcome.stopped:
        _give_back(lease)
    elif outcome.returncode == LEASE_LOST:
        raise Lost
    elif _may_try_alone(job):
        _retry(lease, f"{_COMPANY} {_how(outcome.returncode)}; the job will be tried again alone")
    elif outcome.returncode == -9 and not outcome.starved and _may_try(job):
        _retry(lease, f"The training process {_how(outcome.returncode)}; the job goes back to the queue")
    else:
        fail(lease, KILLED if outcome.returncode == -9 else _unexplained(outcome.returncode))


def fail(lease: Lease, failure: Failure) -> None:
    """`failed`, with whatever steps were logged as the result file."""
    with session_scope() as session:
        job = session.get_one(Job, lease.job_id)
        file = metrics.store_csv(session, get_storage(), job)
        session.rollback()  # the upload is done; nothing was written yet
        if file is not None:
            session.add(file)
            session.flush()
        if jobs.fail(session, lease, failure, result_file_id=file.id if file else None):
            session.commit()


def _may_try_alone(job: Job) -> bool:
    """Another member may have brought the process down, so that each is tried once more by itself."""
    return bool(job.trained_with) and _may_try(job)


def _may_try(job: Job) -> bool:
    return job.attempts < get_settings().max_attempts


def _retry(lease: Lease, reason: str) -> None:
    with session_scope() as session:
        if jobs.retry(session, lease, reason):
            log.warning("to be tried again", reason=reason)
        session.commit()


def _give_back(lease: Lease) -> None:
    with session_scope() as session:
        if jobs.give_back(session, lease, "The worker is shutting down; the job goes back to the queue"):
            log.info("given back")
        session.commit()


def _how(returncode: int) -> str:
    return f"was killed (signal {-returncode})" if returncode < 0 else f"ended with exit code {returncode} and no word"


def _unexplained(returncode: int) -> Failure:
    return Failure("internal_error", f"The training process ended with exit code {returncode} and no word.")
