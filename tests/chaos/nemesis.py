"""What goes wrong, when, and for how long: all of it decided by one seed before anything starts.

Kills come at random moments, and beside them one longer trouble follows another: a deck of all kinds
is shuffled and dealt, so that each kind comes before one comes again. Runs in the main thread, one
action at a time.
"""

import heapq
import itertools
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import Popen

import psutil
from celery import Celery
from redis import Redis

from api.core.queue import queue
from tests import servers
from tests.chaos.fleet import LEASE_SECONDS, Fleet, family
from tests.chaos.storage import Bucket, SmallDisk

# Of a hundred kills: the cheaper a process is to start, the more often it dies.
KINDS = {"trainer": 30, "supervisor": 25, "worker": 15, "reconciler": 15, "api": 15}
QUIET_SECONDS = 1.0
SHARE_OF_REAL = 0.2
QUEUE = "lora:train"

# How long a trouble lasts, and what begins it. It is made from two numbers of [0, 1): how long, and which one.
Lasting = tuple[float, Callable[[], None]]
Trouble = Callable[[float, float], Lasting]


class Nemesis:
    """A plan of faults against a fleet; `tick()` carries out what is due."""

    def __init__(
        self,
        fleet: Fleet,
        disk: SmallDisk | None,
        *,
        seed: int,
        seconds: float,
        kills: int,
        only: str = "",
        patience: float,
    ) -> None:
        self.did: Counter[str] = Counter()
        self.full: list[tuple[float, float]] = []
        self._fleet, self._disk, self._random = fleet, disk, random.Random(seed)
        self._frozen: list[psutil.Process] = []
        self._order = itertools.count()
        self._plan: list[tuple[float, int, Callable[[], None]]] = []
        self._seconds, self._patience = seconds, patience
        chance = self._random
        moments = sorted(chance.uniform(0, seconds) for _ in range(kills))
        names = chance.choices(list(KINDS), list(KINDS.values()), k=kills)
        for moment, name in zip(moments, names, strict=True):
            self._at(moment, self._killer(name, chance.random()))
        self._deal(only)

    def start(self) -> None:
        """The clock of the plan begins to run."""
        self._zero = time.monotonic()

    def tick(self) -> bool:
        """Do what is due; False when nothing is left to do."""
        while self._plan and time.monotonic() - self._zero >= self._plan[0][0]:
            heapq.heappop(self._plan)[2]()
        return bool(self._plan)

    def _at(self, moment: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._plan, (moment, next(self._order), action))

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._at(time.monotonic() - self._zero + seconds, action)

    # --- kill -9 -----------------------------------------------------------------------------------

    def _killer(self, kind: str, pick: float) -> Callable[[], None]:
        """Kill one of a kind; when there is none at this moment, wait for one."""

        def kill() -> None:
            victims = self._victims(kind, pick)
            if not victims:
                self._after(0.2, kill)
                return
            victim = victims[int(pick * len(victims))]
            with suppress(psutil.NoSuchProcess):
                victim.kill()
                self.did[f"kill -9 of {kind}"] += 1

        return kill

    def _victims(self, kind: str, pick: float) -> list[psutil.Process]:
        if kind == "trainer":
            # The real trainer loads torch for seconds. It would never get to training if it were hit as often.
            trainers = self._fleet.trainers()
            return (_quick(trainers) or trainers) if pick > SHARE_OF_REAL else trainers
        return self._fleet.supervisors() if kind == "supervisor" else self._fleet.parents(kind)

    # --- troubles that last ------------------------------------------------------------------------

    def _deal(self, only: str) -> None:
        """Fill the time with troubles, one after another; with `only`, those whose name has this in it."""
        moment = QUIET_SECONDS
        for trouble in self._deck([kind for kind in self._kinds() if only in kind.__name__]):
            length, pick = self._random.uniform(0, 1), self._random.random()
            duration, begin = trouble(length, pick)
            if moment + duration > self._seconds:
                return
            self._at(moment, begin)
            moment += duration + self._random.uniform(QUIET_SECONDS, 3 * QUIET_SECONDS)

    def _kinds(self) -> list[Trouble]:
        kinds = [self._broker_wiped, self._broker_crashed, self._broker_frozen, self._broker_black_holed]
        kinds += [self._supervisor_frozen, self._host_frozen, self._double_notifications, self._drained]
        kinds += [self._postgres_restarted, self._postgres_frozen] if self._fleet.postgres else [self._sqlite_locked]
        kinds += [self._bucket_frozen] if isinstance(self._fleet.store, Bucket) else []
        return kinds + ([self._storage_full, self._storage_read_only] if self._disk else [])

    def _deck(self, kinds: list[Trouble]) -> Iterator[Trouble]:
        while True:
            yield from self._random.sample(kinds, len(kinds))

    def _lasting(
        self,
        name: str,
        seconds: float,
        begin: Callable[[], object],
        end: Callable[[], None],
        *,
        until: Callable[[], bool] = lambda: True,
    ) -> Lasting:
        """A trouble of so many seconds, and longer when by then that which it is there to provoke has not happened,
        but no longer than the attack's patience.

        `begin` returns False when there is nothing that it could befall; it is tried again.
        """

        def start() -> None:
            if begin() is False:
                self._after(0.2, start)
                return
            self.did[name] += 1
            limit = time.monotonic() + seconds + self._patience
            self._after(seconds, lambda: finish(limit))

        def finish(limit: float) -> None:
            if until() or time.monotonic() > limit:
                end()
            else:
                self._after(0.2, lambda: finish(limit))

        return seconds, start

    def _broker_wiped(self, _length: float, _pick: float) -> Lasting:
        def wipe() -> None:
            with Redis.from_url(self._fleet.valkey.url, socket_timeout=5) as client:
                client.flushall()

        return self._lasting("broker wiped", 0, wipe, _nothing)

    def _broker_crashed(self, length: float, pick: float) -> Lasting:
        """It keeps nothing on disk, so it comes back empty."""
        valkey, how = self._fleet.valkey, signal.SIGKILL if pick < 0.5 else signal.SIGTERM
        return self._lasting("broker stopped", 1 + 4 * length, lambda: valkey.stop(how), valkey.start)

    def _broker_frozen(self, length: float, _pick: float) -> Lasting:
        valkey = self._fleet.valkey
        freeze = lambda: valkey.process.send_signal(signal.SIGSTOP)  # noqa: E731
        thaw = lambda: valkey.process.send_signal(signal.SIGCONT)  # noqa: E731
        return self._lasting("broker frozen", 3 + 5 * length, freeze, thaw)

    def _broker_black_holed(self, length: float, _pick: float) -> Lasting:
        hole = self._fleet.proxy.black_hole
        return self._lasting("broker black-holed", 4 + 6 * length, lambda: hole(True), lambda: hole(False))

    def _postgres_restarted(self, length: float, pick: float) -> Lasting:
        postgres, how = self._fleet.postgres, signal.SIGQUIT if pick < 0.5 else signal.SIGINT
        assert postgres is not None
        return self._lasting("PostgreSQL restarted", 2 * length, lambda: postgres.stop(how), postgres.start)

    def _postgres_frozen(self, length: float, _pick: float) -> Lasting:
        postgres = self._fleet.postgres
        assert postgres is not None
        return self._server_frozen("database frozen", 3 + 7 * length, lambda: postgres.process)

    def _bucket_frozen(self, length: float, _pick: float) -> Lasting:
        bucket = self._fleet.store
        assert isinstance(bucket, Bucket)
        return self._server_frozen("bucket frozen", 3 + 7 * length, lambda: bucket.process)

    def _server_frozen(self, name: str, seconds: float, server: Callable[[], Popen[bytes]]) -> Lasting:
        thaws: list[Callable[[], None]] = []
        freeze = lambda: thaws.append(servers.freeze(server()))  # noqa: E731
        return self._lasting(name, seconds, freeze, lambda: thaws.pop()())

    def _sqlite_locked(self, length: float, _pick: float) -> Lasting:
        """Somebody writes to it and does not come to an end: a backup, or a person with a shell."""
        held: list[sqlite3.Connection] = []

        def lock() -> bool:
            path = self._fleet.database.removeprefix("sqlite:///")
            connection = sqlite3.connect(path, timeout=1, isolation_level=None)
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                connection.close()
                return False
            held.append(connection)
            return True

        return self._lasting("database locked", 3 + 7 * length, lock, lambda: held.pop().close())

    def _supervisor_frozen(self, length: float, _pick: float) -> Lasting:
        """That of the run which began last, past its lease, until its job has a successor.

        Its jobs cannot end meanwhile, so that an earlier attempt which nobody stops is at work beside the later one.
        """
        before: dict[Path, int] = {}

        def freeze() -> bool:
            for victim in _by_youngest_run(self._fleet.supervisors()):
                if logs := self._logs_of(victim):
                    before.update({log: _attempts(log) for log in logs})
                    self._hold(logs)
                    self._freeze([victim])
                    return True
            return False

        def thaw() -> None:
            self._release(before)
            self._thaw()

        def taken_over() -> bool:
            return all(_attempts(log) > count for log, count in before.items())

        seconds = LEASE_SECONDS * (1.3 + 1.2 * length)
        return self._lasting("supervisor frozen", seconds, freeze, thaw, until=taken_over)

    def _hold(self, logs: Iterable[Path]) -> None:
        for log in logs:
            (self._fleet.held / log.name).touch()

    def _release(self, logs: Iterable[Path]) -> None:
        for log in logs:
            (self._fleet.held / log.name).unlink(missing_ok=True)

    def _logs_of(self, supervisor: psutil.Process) -> list[Path]:
        """Where the trainers below it write down their steps."""
        found = []
        for trainer in family(supervisor.pid):
            with suppress(psutil.Error):
                specs = [Path(word) for word in trainer.cmdline() if word.endswith("/spec.json")]
                found += [self._fleet.steps / spec.parent.parent.name for spec in specs]
        return [log for log in found if log.exists()]

    def _host_frozen(self, length: float, pick: float) -> Lasting:
        """A worker with everything below it, as when its machine is suspended."""

        def freeze() -> None:
            workers = self._fleet.parents("worker")
            for worker in workers[int(pick * len(workers)) :][:1]:
                self._freeze([worker, *family(worker.pid)])

        return self._lasting("worker's host frozen", LEASE_SECONDS * (1.3 + 1.2 * length), freeze, self._thaw)

    def _freeze(self, victims: list[psutil.Process]) -> None:
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.suspend()
                self._frozen.append(victim)

    def _thaw(self) -> None:
        for victim in self._frozen:
            with suppress(psutil.NoSuchProcess):
                victim.resume()
        self._frozen.clear()

    def _drained(self, _length: float, pick: float) -> Lasting:
        def drain() -> None:
            workers = self._fleet.parents("worker")
            for worker in workers[int(pick * len(workers)) :][:1]:
                worker.terminate()

        return self._lasting("worker drained", 3, drain, _nothing)

    def _double_notifications(self, _length: float, pick: float) -> Lasting:
        """Every message twice, in another order, with some for jobs that nobody knows."""

        def shake() -> None:
            with Redis.from_url(self._fleet.valkey.url, socket_timeout=5) as client:
                waiting = client.lrange(QUEUE, 0, -1)
                random.Random(pick).shuffle(waiting)
                if waiting:
                    client.rpush(QUEUE, *waiting)
            _notify_of_nobody(self._fleet.valkey.url)

        return self._lasting("notifications doubled and shuffled", 0, shake, _nothing)

    def _storage_full(self, length: float, _pick: float) -> Lasting:
        disk = self._disk
        assert disk is not None
        began: list[float] = []

        def fill() -> None:
            began.append(time.monotonic())
            disk.fill()

        def drain() -> None:
            disk.drain()
            self.full.append((began[0], time.monotonic()))

        return self._lasting("storage full", 2 + 4 * length, fill, drain)

    def _storage_read_only(self, length: float, _pick: float) -> Lasting:
        disk = self._disk
        assert disk is not None
        begin, end = (lambda: disk.read_only(True)), (lambda: disk.read_only(False))
        return self._lasting("storage read-only", 2 + 4 * length, begin, end)


def _by_youngest_run(supervisors: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have a run, the one that has most of it before it first."""
    began = {one: run.create_time() for one in supervisors for run in family(one.pid, recursive=False)}
    return sorted(began, key=lambda one: -began[one])


def _attempts(log: Path) -> int:
    return len({line.split()[1] for line in log.read_text().splitlines() if line.count(" ") == 3})


def _quick(trainers: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for one in trainers:
        with suppress(psutil.Error):
            found += [one] if any(word.endswith("trainer.py") for word in one.cmdline()) else []
    return found


def _notify_of_nobody(broker: str) -> None:
    strangers = Celery("nemesis", broker=broker, set_as_current=False)
    strangers.conf.broker_transport_options = {"global_keyprefix": "lora:"}
    for number in range(5):
        strangers.send_task(queue.TASK, args=[f"ftjob-nobody-{number}"], queue=queue.QUEUE)
    strangers.close()


def _nothing() -> None:
    """A trouble that needs no end."""
