"""`python -m tests.chaos`: the service under attack, and a table of what came of it.

Exit code 0 when nothing was lost, doubled, stuck or wrong, 1 when something was.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.chaos import real
from tests.chaos.clients import FINAL, Book, User, stub_orders
from tests.chaos.fleet import LEASE_SECONDS, Fleet
from tests.chaos.judge import BAD, Judge, Verdict
from tests.chaos.ledger import Ledger
from tests.chaos.mutants import MUTANTS
from tests.chaos.nemesis import Nemesis
from tests.chaos.orphans import Orphans
from tests.chaos.storage import Bucket, Folder, SmallDisk, enter
from tests.promises import within

TICK_SECONDS = 0.05
REAL_STEPS = 300


def main() -> int:
    """Run, print, and say by the exit code whether every promise was kept."""
    options = _options()
    can_mount = enter()
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        verdict = attack(place, options, can_mount=can_mount)
    finally:
        if options.keep:
            print(f"kept: {place}")
        else:
            shutil.rmtree(place, ignore_errors=True)
    return 0 if verdict.is_clean else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="decides every fault and its moment")
    parser.add_argument("--seconds", type=float, default=480, help="how long faults come")
    parser.add_argument("--kills", type=int, default=220, help="how many processes are killed in that time")
    parser.add_argument("--settle", type=float, default=120, help="how long jobs may take to end afterwards")
    parser.add_argument("--steps", type=int, nargs=2, default=(150, 250), help="shortest and longest job")
    parser.add_argument("--only", default="", help="only troubles whose name has this in it, as in supervisor_frozen")
    parser.add_argument("--storage", choices=["folder", "bucket"], default="folder", help="where files are kept")
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="postgresql")
    parser.add_argument("--patience", type=float, default=20, help="how long a trouble waits for what it is to provoke")
    parser.add_argument("--users", type=int, default=4, help="who order three jobs at a time, for four slots")
    parser.add_argument("--fickle", type=float, default=0.15, help="share of their jobs that they cancel")
    parser.add_argument("--real", type=int, default=4, help="how many jobs on a real base, beside two in peace")
    parser.add_argument("--moody", type=float, default=0.2, help="share of their jobs that they pause and resume")
    parser.add_argument("--group", type=float, default=0.3, help="share of their jobs that may be trained together")
    parser.add_argument(
        "--mutant",
        choices=sorted(MUTANTS),
        help="take one safeguard out, with the attack that needs it; chaos must notice",
    )
    parser.add_argument("--keep", action="store_true", help="keep logs and files of the run")
    mutant = parser.parse_known_args()[0].mutant
    if mutant:
        parser.set_defaults(**MUTANTS[mutant].attack)
    return parser.parse_args()


def attack(place: Path, options: argparse.Namespace, *, can_mount: bool) -> Verdict:
    """Start everything, disturb it, let it settle, judge."""
    with ExitStack() as exits:
        store = exits.enter_context(Bucket.served()) if options.storage == "bucket" else Folder(place / "storage")
        disk = SmallDisk(store.path) if isinstance(store, Folder) and can_mount else None
        if disk is not None:
            exits.callback(disk.close)
        catalogue = real.catalogue(place / "tiny") if options.real else ""
        sqlite = options.database == "sqlite"
        fleet = Fleet(place, store, mutant=options.mutant, catalogue=catalogue, sqlite=sqlite)
        exits.callback(fleet.close)
        secret, ledger = fleet.set_up(), Ledger(fleet.database)
        ledger.watch()
        plan = {"seed": options.seed, "seconds": options.seconds, "kills": options.kills, "only": options.only}
        plan["patience"] = options.patience
        nemesis = Nemesis(fleet, disk, **plan)
        book, orphans = Book(), Orphans(fleet)
        meet = partial(User, fleet.url, secret, book)
        _loop(fleet, orphans, until=fleet.is_up, seconds=within(90))
        users = [meet(name="peace", wants=real.orders(2, steps=REAL_STEPS))] if options.real else []
        for user in users:
            user.start()
        _loop(fleet, orphans, until=lambda: not users or _ended(book), seconds=180)
        users = _users(meet, options)
        for user in users:
            user.start()
        _loop(fleet, orphans, until=lambda: bool(fleet.trainers()), seconds=60)
        nemesis.start()
        _loop(fleet, orphans, until=lambda: not nemesis.tick(), seconds=options.seconds * 3 + options.patience)
        for user in users:
            user.closed.set()
        open_jobs = "SELECT id FROM jobs WHERE finished_at IS NULL"
        _loop(fleet, orphans, until=lambda: not ledger.rows(open_jobs), seconds=within(options.settle), pause=0.5)
        _loop(fleet, orphans, until=lambda: False, seconds=LEASE_SECONDS + 1)
        for user in users:
            user.gone.set()
        verdict = Judge(ledger, book=book, store=store, steps=fleet.steps).decide(full=nemesis.full)
        for sentence in orphans.found:
            verdict.blame("orphan trainers", sentence)
        _print(verdict, nemesis, options, can_mount=can_mount)
        return verdict


def _users(meet: Callable[..., User], options: argparse.Namespace) -> list[User]:
    found = [meet(name="real", wants=real.orders(options.real, steps=REAL_STEPS), at_once=1)] if options.real else []
    for number in range(options.users):
        seed = options.seed * 1000 + number
        wants = stub_orders(seed=seed, steps=tuple(options.steps), group=options.group)
        moods = {"fickle": options.fickle, "moody": options.moody}
        found.append(meet(name=f"user-{number}", wants=wants, seed=seed, **moods))
    return found


def _ended(book: Book) -> bool:
    return len(book.orders) > 1 and all(order.status in FINAL for order in book.orders)


def _loop(fleet: Fleet, orphans: Orphans, *, until: object, seconds: float, pause: float = TICK_SECONDS) -> None:
    """Keep the fleet alive until something is so, or the time is up."""
    assert callable(until)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not until():
        fleet.tend()
        orphans.look()
        time.sleep(pause)


def _print(verdict: Verdict, nemesis: Nemesis, options: argparse.Namespace, *, can_mount: bool) -> None:
    kills = sum(count for name, count in nemesis.did.items() if name.startswith("kill"))
    times = f"{options.seconds:.0f} s and {options.settle:.0f} s to settle"
    print(f"\nchaos: seed {options.seed}, {times}, {kills} kills, mutant {options.mutant or 'none'}")
    print(f"files in a {options.storage}, rows in {options.database}\n")
    for name, count in sorted(nemesis.did.items()):
        print(f"  {name:32} {count:6}")
    if options.storage == "folder" and not can_mount:
        print("  storage full or read-only             -   (no user namespaces here)")
    print()
    for name, count in sorted(verdict.counts.items(), key=lambda item: item[0] in BAD):
        digits, mark = 0 if count == int(count) else 1, "   <-- must be 0" if name in BAD and count else ""
        print(f"  {name:32} {count:6.{digits}f}{mark}")
    for sentence in verdict.complaints[:40]:
        print(f"  ! {sentence}")
    print("\n" + ("every promise was kept" if verdict.is_clean else "PROMISES WERE BROKEN"))


if __name__ == "__main__":
    sys.exit(main())
