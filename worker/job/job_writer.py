"""Writes one job of a run: its folder, its lease and its rows. A run of one job has one writer.

Each writer has a thread of its own, which writes events in the order in which the child sent them. So a slow upload of
one job does not delay the others. It does not fill the child's pipe either, whose 64 KiB hold only a few steps of many
jobs (docs/grouped.md). A failure for one job ends that job and no other.
"""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self

from structlog.contextvars import bind_contextvars

from api.core.db.tables import Job
from api.core.files.storage import Storage, get_storage
from api.core.jobs.jobs import Lease
from api.core.logs import get_logger
from api.core.settings import get_settings
from lorainit.config.events import Checkpoint, Done, Event, Failed, Halted
from worker.child.supervisor import Outcome, RunPaths
from worker.host import disk_space, scratch
from worker.job import artifacts, outcomes, path_redaction
from worker.job.lease import LeaseKeeper
from worker.job.leased_storage import LeasedStorage
from worker.job.progress import EventRecorder, LeaseLost
from worker.job.retry import Result, retry_until_lost, run_unless_lost

log = get_logger(__name__)


class JobWriter:
    """Holds one claimed job while the context is open, and writes its events and its end.

    `paths` is set once the job is prepared. Methods that leave work to the job's thread return a `Future` that never
    raises.
    """

    def __init__(self, job: Job) -> None:
        settings = get_settings()
        self.paths: RunPaths | None = None
        self._job, self._lease = job, Lease(job.id, job.lease_token)
        self._folder = settings.scratch() / job.id / f"attempt-{job.lease_token}"
        self._keeper = LeaseKeeper(
            self._lease, self._folder / "lease", seconds=settings.lease_seconds, beat=settings.beat_seconds
        )
        self._names = path_redaction.find_public_names(job, self._folder)
        self._recorder = EventRecorder(self._lease)
        self._ended = threading.Event()
        bind = partial(bind_contextvars, job_id=job.id, token=job.lease_token)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=job.id, initializer=bind)

    def __enter__(self) -> Self:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._held = scratch.lock_folder(self._folder)
        self._keeper.__enter__()
        log.info("claimed", job_id=self._job.id, token=self._lease.token, attempt=self._job.attempts)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self._keeper.let_go()  # so that a thread which waits for the database or storage gives up
        # In this order: the lease is renewed until the last write, because a write without a lease is refused.
        self._thread.shutdown(cancel_futures=True)
        self._keeper.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._held.close()
        with suppress(OSError):  # because another attempt's folder may be beside it
            self._folder.parent.rmdir()

    @property
    def is_lost(self) -> bool:
        """Whether the job is not ours any more. Then nothing is written for it, and the child drops it."""
        return self._keeper.lost.is_set()

    @property
    def is_pausing(self) -> bool:
        """Whether somebody asked for a pause, so that the child has to write a checkpoint and end."""
        return self._keeper.pausing.is_set()

    @property
    def is_over(self) -> bool:
        """Whether the child has nothing left to do for this job."""
        return self.is_lost or self._ended.is_set()

    def prepare(self) -> Future[None]:
        """Download what the child needs; `paths` stays None if that failed."""
        return self._submit(self._prepare)

    def write_event(self, event: Event) -> None:
        """Write an event of the child. `Done`, `Failed` or `Halted` ends the job's run at once, while others go on."""
        event = path_redaction.redact_paths(event, self._names)
        if isinstance(event, Done | Failed | Halted):
            self._ended.set()
            self._submit(partial(self._end, event))
        else:
            self._submit(partial(self._record, event))

    def finish(self, outcome: Outcome, reason: str) -> Future[None]:
        """The child has ended: end the job unless its end was reported. `reason`: why we stopped it, if we did."""
        return self._submit(partial(self._end_without_report, outcome, reason))

    def abort(self, error: Exception) -> Future[None]:
        """The child could not be supervised, because of an error in our code or a failure of the host."""
        return self._submit(partial(self._write_ending, partial(outcomes.end_after_worker_error, self._lease, error)))

    @property
    def _storage(self) -> Storage:
        return LeasedStorage(get_storage(), self._keeper.lost)

    # --- in the thread of the job -----------------------------------------------------------------

    def _submit(self, action: Callable[[], None]) -> Future[None]:
        return self._thread.submit(self._run_guarded, action)

    def _run_guarded(self, action: Callable[[], None]) -> None:
        if self.is_lost:  # because nothing may be written any more
            return
        try:
            action()
        except LeaseLost:
            log.warning("the job is not ours any more; stopped")
            self._keeper.let_go()
        except disk_space.WaitForDiskSpace as reason:
            self._write_ending(partial(outcomes.requeue_for_disk_space, self._lease, str(reason)))
        except disk_space.DoesNotFit as error:
            self._write_ending(partial(outcomes.fail, self._lease, error.failure))
        except Exception as error:
            log.exception("the worker failed")
            self._write_ending(partial(outcomes.end_after_worker_error, self._lease, error))

    def _write_ending(self, write: Callable[[], None]) -> None:
        try:
            run_unless_lost(write, until=self._keeper.lost)
        except LeaseLost:
            log.warning("the job is not ours any more; stopped")
        except Exception:
            log.exception("the end of the job could not be written either; its lease will run out")
        self._keeper.let_go()

    def _prepare(self) -> None:
        spec = self._retry(partial(artifacts.prepare, self._job, self._lease, self._folder, self._storage))
        self.paths = RunPaths(spec=spec, out=self._folder / "out", lease=self._folder / "lease")

    def _record(self, event: Event) -> None:
        self._recorder.add(event)
        if self._recorder.is_due or isinstance(event, Checkpoint):
            self._retry(self._recorder.flush)
        if isinstance(event, Checkpoint):
            # Stored after its metrics, so that a resumed run never has a checkpoint that is newer than its metrics.
            store = partial(artifacts.store_checkpoint, self._job, self._lease, event, self._folder, self._storage)
            self._retry(store)

    def _end(self, end: Done | Failed | Halted) -> None:
        self._retry(self._recorder.flush)
        if isinstance(end, Done):
            folder, progress = self._folder, self._recorder.progress
            store = partial(artifacts.store_result, self._job, self._lease, end, folder, self._storage, progress)
            self._retry(store)
            log.info("succeeded")
        elif isinstance(end, Halted):
            self._retry(partial(outcomes.halt, self._lease, end.step))
        else:
            self._retry(partial(outcomes.end_as_reported, self._job, self._lease, end))
        self._keeper.close()

    def _end_without_report(self, outcome: Outcome, reason: str) -> None:
        if self._ended.is_set():
            return
        self._retry(self._recorder.flush)
        self._retry(partial(outcomes.end_without_report, self._job, self._lease, outcome, reason))

    def _retry(self, action: Callable[[], Result]) -> Result:
        return retry_until_lost(action, until=self._keeper.lost)
