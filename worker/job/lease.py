"""Keeps a job's lease: a thread renews it in the database, and writes its deadline to a file that the child reads.

The thread ends the run in two cases. The database says that the job is not ours any more (cancelled, or lost and taken
over). Or the database has not answered for most of a lease, because another worker may have the job then. In both
cases it removes the file, and the child drops the job. The child also drops it when the deadline in the file passes, so
it does not matter if this process is frozen. Requests to pause are noticed here, too.
"""

import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from api.core.db.database import session_scope
from api.core.jobs import jobs, pauses
from api.core.jobs.jobs import Lease
from api.core.logs import get_logger

# Give up before the lease runs out, because the reconciler may requeue the job as soon as it does.
MARGIN = 0.8


class LeaseKeeper:
    """Renews `lease` every `beat` seconds while the context is open.

    `lost` is set once the job is not ours any more. Nothing may be written for it from then on. `pausing` is
    set once somebody asked for a pause.
    """

    def __init__(self, lease: Lease, file: Path, *, seconds: float, beat: float) -> None:
        self.lost, self.pausing = threading.Event(), threading.Event()
        self._lease, self._file, self._seconds, self._beat = lease, file, seconds, beat
        self._closed = threading.Event()
        self._deadline = time.monotonic() + seconds * MARGIN
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._write_file()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop renewing. The file stays until its deadline, because a child that reported its end exits by itself."""
        self._closed.set()
        self._thread.join()

    def let_go(self) -> None:
        """Stop running the job here, whoever owns it. The child drops it at once."""
        self.lost.set()
        self.close()
        self._file.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._closed.wait(self._beat) and not self.lost.is_set():
            asked = time.monotonic()
            ours = self._renew()
            if ours:
                # From before the request: the database's lease begins later, so ours never ends after it.
                self._deadline = asked + self._seconds * MARGIN
                self._write_file()
            elif ours is False or time.monotonic() > self._deadline:
                self._file.unlink(missing_ok=True)
                self.lost.set()

    def _renew(self) -> bool | None:
        try:
            with session_scope() as session:
                ours = jobs.renew_lease(session, self._lease, lease_seconds=self._seconds)
                asked = ours and pauses.is_pause_requested(session, self._lease)
                session.commit()
        except Exception as error:  # any, because the deadline decides, and it is tried again until then
            get_logger(__name__).warning("the lease could not be renewed", error=str(error))
            return None
        if asked:
            self.pausing.set()
        return ours

    def _write_file(self) -> None:
        draft = self._file.with_suffix(".new")
        draft.write_text(repr(self._deadline))
        os.replace(draft, self._file)  # noqa: PTH105  (atomic: the child never reads half a number)
