"""What a job's life should be, in plain Python: the model that `test_life.py` holds against the database.

Written from the table of states in the API's description, not from the code: it shares nothing with it.
"""

from dataclasses import dataclass

STEP, LIMIT, LEASE, ATTEMPTS, RETRY = 3600.0, 2, 30.0, 3, 10.0
PASSING = {"worker_lost", "disk_full"}


@dataclass
class Life:
    """One job as it should be."""

    project: str
    priority: int
    status: str = "validating_files"
    asked: bool = False
    token: int = 0
    attempts: int = 0
    lost_runs: int = 0
    priority_time: float | None = None
    not_before: float = 0.0
    lease_until: float | None = None
    error: str | None = None
    saved: bool = False
    notified: bool = False

    @property
    def shown(self) -> str:
        return "pausing" if self.asked else self.status

    @property
    def is_over(self) -> bool:
        return self.status in ("succeeded", "failed", "cancelled")

    def held_by(self, token: int) -> bool:
        return self.status == "running" and self.token == token

    def line_up(self, at: float) -> None:
        self.status, self.priority_time, self.notified = "queued", at - STEP * self.priority, False

    def start(self, at: float) -> None:
        self.status, self.lease_until, self.not_before = "running", at + LEASE, 0.0
        self.token += 1
        self.attempts += 1

    def leave(self, status: str, error: str | None = None) -> None:
        self.status, self.error, self.lease_until, self.asked = status, error, None, False

    def stop(self) -> None:
        """The run ends without an end: where to?"""
        self.notified = self.notified and self.asked
        self.leave("paused" if self.asked else "queued")

    def lose(self, at: float) -> None:
        self.lost_runs += 1
        if self.lost_runs >= ATTEMPTS:
            self.leave("failed", "worker_lost")
        else:
            self.not_before = at + (RETRY * 2 ** (self.lost_runs - 2) if self.lost_runs > 1 else 0)
            self.stop()

    def cancel(self) -> str | None:
        """The code of the refusal, if there is one."""
        if self.status in ("succeeded", "failed"):
            return "invalid_job_state"
        if self.status != "cancelled":
            self.leave("cancelled")
            self.token += 1
        return None

    def pause(self) -> str | None:
        if self.is_over:
            return "invalid_job_state"
        if self.status == "running":
            self.asked = True
        else:
            self.status = "paused"
        return None

    def resume(self, at: float) -> str | None:
        if self.asked or self.status in ("succeeded", "cancelled"):
            return "invalid_job_state"
        if self.status == "failed" and not (self.error in PASSING and self.saved):
            return "job_not_resumable"
        if self.status not in ("paused", "failed"):
            return None
        self.leave("validating_files")
        if self.priority_time is not None:
            self.line_up(at)
            self.lost_runs, self.not_before = 0, 0.0
        return None


def next_up(lives: dict[str, Life], at: float) -> str | None:
    """The id of the job that a claim should take."""
    waiting = {i: one for i, one in lives.items() if one.status == "queued" and one.not_before <= at}
    best: tuple[float, str] | None = None
    for project in {one.project for one in waiting.values()}:
        running = sum(one.project == project and one.status == "running" for one in lives.values())
        line = sorted((one.priority_time or 0.0, i) for i, one in waiting.items() if one.project == project)
        for slot, (turn, i) in enumerate(line, start=running + 1):
            if slot <= LIMIT:
                best = min(best or (float("inf"), ""), (turn + STEP * slot, i))
    return best[1] if best else None
