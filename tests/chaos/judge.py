"""What was promised, held against what happened: users' book, database, storage and the trainers' own log."""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from tests.chaos import real
from tests.chaos.clients import FINAL, Book, Order
from tests.chaos.ledger import Ledger
from tests.chaos.storage import Store
from tests.chaos.trainer import after, begin, loss

CANCEL_SECONDS = 5.0
Line = tuple[float, int, int, int]  # when, token, pid, step (0 = the process started)

BAD = (
    "lost",
    "ordered twice",
    "stuck",
    "failed",
    "overlapping",
    "stale writes",
    "orphan trainers",
    "wrong adapters",
    "wrong metrics",
    "wrong stories",
    "ran on after cancel",
    "wrong answers",
)


@dataclass
class Verdict:
    """Counts by column, and a sentence for each thing that is wrong."""

    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BAD, 0))
    complaints: list[str] = field(default_factory=list)

    def blame(self, column: str, sentence: str) -> None:
        """One more in a bad column."""
        self.counts[column] += 1
        self.complaints.append(f"{column}: {sentence}")

    @property
    def is_clean(self) -> bool:
        """No bad column counts anything."""
        return not any(self.counts[column] for column in BAD)


class Judge:
    """Everything there is to know of one run, once it is over."""

    def __init__(self, ledger: Ledger, *, book: Book, store: Store, steps: Path) -> None:
        self.verdict = Verdict()
        self._book, self._store = book, store
        self._jobs = {row["id"]: row for row in ledger.rows("SELECT * FROM jobs")}
        self._stale = ledger.rows("SELECT * FROM chaos_stale")
        self._metrics = _grouped(ledger.rows("SELECT * FROM metrics ORDER BY job_id, step"))
        self._events = _grouped(ledger.rows("SELECT * FROM events ORDER BY job_id, sequence"))
        files = "SELECT a.job_id, f.storage_key, f.sha256, f.bytes FROM adapters a JOIN files f ON f.id = a.file_id"
        self._adapters = {row["job_id"]: row for row in ledger.rows(files)}
        self._lines = {path.name: _lines(path) for path in steps.iterdir()}

    def decide(self, *, full: Sequence[tuple[float, float]] = ()) -> Verdict:
        """Look at every job. `full` says when storage was full: a job may then fail, if it says that."""
        self._orders()
        for job_id, job in self._jobs.items():
            self._end(job, excused=bool(full))
            self._story(job_id, job)
            self._numbers(job_id, job)
            self._overlap(job_id)
            if job["status"] == "succeeded":
                self._adapter(job_id, job)
        self._real()
        for row in self._stale:
            self.verdict.blame("stale writes", "{job_id} {relation} by {token}, owner {owner}, {status}".format(**row))
        for sentence in self._book.wrong:
            self.verdict.blame("wrong answers", sentence)
        self._summary()
        return self.verdict

    def _orders(self) -> None:
        for order in self._book.orders:
            if order.job_id is not None and order.job_id not in self._jobs:
                self.verdict.blame("lost", f"{order.job_id} was accepted and is not there")
            self._cancelled(order)
        wanted, made = (Counter(keys) for keys in (self._wanted(), self._made()))
        for (model, seed), count in made.items():
            if count > wanted[model, seed]:
                self.verdict.blame("ordered twice", f"{count} jobs on {model} with seed {seed}")

    def _wanted(self) -> Iterator[tuple[str, int]]:
        return ((order.body["model"], order.body["seed"]) for order in self._book.orders)

    def _made(self) -> Iterator[tuple[str, int]]:
        return ((job["model"], job["seed"]) for job in self._jobs.values())

    def _cancelled(self, order: Order) -> None:
        if order.cancelled_at is None or order.job_id is None:
            return
        if self._jobs.get(order.job_id, {}).get("status") != "cancelled":
            self.verdict.blame("wrong stories", f"{order.job_id} was cancelled and is not")
        late = [
            when for when, _, _, _ in self._lines.get(order.job_id, []) if when > order.cancelled_at + CANCEL_SECONDS
        ]
        if late:
            self.verdict.blame("ran on after cancel", f"{order.job_id} {late[-1] - order.cancelled_at:.1f} s")

    def _end(self, job: dict[str, Any], *, excused: bool) -> None:
        if job["status"] not in FINAL:
            self.verdict.blame("stuck", f"{job['id']} is {job['status']}, token {job['lease_token']}")
        elif job["status"] == "failed" and not (excused and job["error"]["code"] == "disk_full"):
            self.verdict.blame("failed", f"{job['id']}: {job['error']}")

    def _story(self, job_id: str, job: dict[str, Any]) -> None:
        """Events are numbered without gaps, statuses follow each other, and the last one is said once."""
        events = self._events[job_id]
        if [event["sequence"] for event in events] != list(range(1, len(events) + 1)):
            self.verdict.blame("wrong stories", f"{job_id}'s events have gaps")
        moves = [event["data"] for event in events if event["data"].get("kind") == "status"]
        for one, following in itertools.pairwise(moves):
            if following["previous"] != one["status"]:
                self.verdict.blame("wrong stories", f"{job_id}: {one['status']}, then from {following['previous']}")
        ends = [move["status"] for move in moves if move["status"] in FINAL]
        if ends != [job["status"]] * (job["status"] in FINAL):
            self.verdict.blame("wrong stories", f"{job_id} is {job['status']} and its events say {ends}")

    def _numbers(self, job_id: str, job: dict[str, Any]) -> None:
        """Each step has its numbers once, none is missing, and they are those of an undisturbed run."""
        rows = self._metrics[job_id]
        if job["model"] == real.MODEL:
            return
        wanted = itertools.islice(_losses(job["seed"]), len(rows))
        for row, (step, value) in zip(rows, wanted, strict=True):
            if (row["step"], row["values"].get("train_loss")) != (step, value):
                self.verdict.blame("wrong metrics", f"{job_id} has {row['step']} where {step} belongs")
                return
        if job["status"] == "succeeded" and len(rows) != _steps(job):
            self.verdict.blame("wrong metrics", f"{job_id} has {len(rows)} of {_steps(job)} steps")

    def _adapter(self, job_id: str, job: dict[str, Any]) -> None:
        """Stored, whole, of the last attempt, and that of an undisturbed run."""
        row = self._adapters.get(job_id)
        content = self._store.read(row["storage_key"]) if row else None
        if row is None or content is None:
            self.verdict.blame("wrong adapters", f"{job_id} has none")
        elif hashlib.sha256(content).hexdigest() != row["sha256"]:
            self.verdict.blame("wrong adapters", f"{job_id}'s checksum")
        elif f"/attempt-{job['lease_token']}/" not in f"/{row['storage_key']}":
            self.verdict.blame("wrong adapters", f"{job_id}'s is of another attempt: {row['storage_key']}")
        elif job["model"] != real.MODEL and real.weights(content).decode() != _last_state(job):
            self.verdict.blame("wrong adapters", f"{job_id}'s weights")

    def _real(self) -> None:
        """Jobs on the real base: the first of one process and of two were left in peace, and the others are equal."""
        done = [job for job in self._jobs.values() if job["model"] == real.MODEL and job["status"] == "succeeded"]
        done.sort(key=lambda job: job["created_at"])
        for job in done:
            peace = next(one for one in done if one["devices"] == job["devices"])
            if self._content(job) != self._content(peace):
                self.verdict.blame("wrong adapters", f"{job['id']}'s weights are not those of a run in peace")
            if real.numbers(self._metrics[job["id"]]) != real.numbers(self._metrics[peace["id"]]):
                self.verdict.blame("wrong metrics", f"{job['id']}'s are not those of a run in peace")
        tokens = [{row["lease_token"] for row in self._metrics[job["id"]]} for job in done]
        self.verdict.counts["on a real base"] = len(done)
        self.verdict.counts["  of these in two processes"] = sum(job["devices"] > 1 for job in done)
        self.verdict.counts["  of these resumed"] = sum(len(one) > 1 for one in tokens)

    def _content(self, job: dict[str, Any]) -> bytes:
        content = self._store.read(self._adapters[job["id"]]["storage_key"])
        assert content is not None, f"{job['id']} has no adapter"
        return real.weights(content)

    def _overlap(self, job_id: str) -> None:
        """No step of an attempt begins after a later attempt's process has started."""
        for earlier, later in itertools.pairwise(self._attempts(job_id)):
            over = earlier[-1][0] - later[0][0]
            if over > 0:
                self.verdict.blame("overlapping", f"{job_id}: {earlier[0][1]} and {later[0][1]} by {over:.2f} s")

    def _attempts(self, job_id: str) -> list[list[Line]]:
        lines = sorted(self._lines.get(job_id, []), key=lambda line: line[1])
        return [sorted(group) for _, group in itertools.groupby(lines, key=lambda line: line[1])]

    def _summary(self) -> None:
        counts, statuses = self.verdict.counts, [job["status"] for job in self._jobs.values()]
        attempts = [self._attempts(job_id) for job_id in self._jobs]
        again = [runs for runs in attempts if len(runs) > 1]
        resumed = [run for runs in again for run in runs[1:] if any(line[3] > 1 for line in run[:2])]
        steps = [[line[3] for run in runs for line in run if line[3]] for runs in again]
        restarts = sum(len(runs) - 1 for runs in again)
        gaps = [b[0][0] - a[-1][0] for runs in again for a, b in itertools.pairwise(runs)]
        times = [(min(runs[0]), max(runs[-1])) for runs in attempts if runs]
        counts["submitted"] = sum(order.job_id is not None for order in self._book.orders)
        counts["finished"] = statuses.count("succeeded")
        counts["cancelled"] = statuses.count("cancelled")
        counts["paused"] = sum(_went(events, "paused") for events in self._events.values())
        counts["trained together"] = sum(bool(job["trained_with"]) for job in self._jobs.values())
        counts["requests repeated"] = self._book.retried
        counts["attempts"] = sum(map(len, attempts))
        counts["resumed"] = len(resumed)
        counts["mean steps lost"] = sum(len(own) - len(set(own)) for own in steps) / restarts if restarts else 0
        counts["mean s to next attempt"] = fmean(gaps) if gaps else 0
        counts["mean s of a job"] = fmean(last[0] - first[0] for first, last in times) if times else 0


def _went(events: list[dict[str, Any]], status: str) -> int:
    return sum(event["data"].get("kind") == "status" and event["data"]["status"] == status for event in events)


def _lines(path: Path) -> list[Line]:
    """A line that was cut off by a kill is no line."""
    whole = (text.split() for text in path.read_text().splitlines())
    return [
        (float(at), int(token), int(pid), int(step)) for at, token, pid, step in (one for one in whole if len(one) == 4)
    ]


def _grouped(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["job_id"]].append(row)
    return found


def _steps(job: dict[str, Any]) -> int:
    return int(job["recipe"]["training"]["max_steps"])


def _losses(seed: int) -> Iterator[tuple[int, float]]:
    state = begin(seed)
    for step in itertools.count(1):
        state = after(state, step)
        yield step, loss(state)


def _last_state(job: dict[str, Any]) -> str:
    state = begin(job["seed"])
    for step in range(1, _steps(job) + 1):
        state = after(state, step)
    return state
