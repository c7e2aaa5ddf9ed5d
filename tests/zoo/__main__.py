"""Try every kind of the zoo and write what came of it: `python -m tests.zoo --write docs/models.md`.

Each kind has a process of its own, with a limit of time and memory; what it found is kept under `.state/zoo` until
the code changes, so an interrupted run goes on where it was.
"""

import argparse
import gc
import hashlib
import json
import logging
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from tests.zoo.bases import KINDS
from tests.zoo.downloads import ROOT
from tests.zoo.examine import examine
from tests.zoo.finding import CASES, REFUSALS, Case, Finding
from tests.zoo.table import write

KEPT = ROOT / ".state" / "zoo"
# Limits of one kind: a base that should be refused gets less time than a slow refusal deserves.
SECONDS, BYTES = {"trains": 1200, "refused": 90}, 8 << 30
PACKAGES = ("transformers", "peft", "torch", "safetensors", "tokenizers")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--write", type=Path, help="put the tables between the markers of this page")
    parser.add_argument("--only", default="", help="kinds, separated by commas")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--again", action="store_true", help="forget what earlier runs found")
    parser.add_argument("--older", action="store_true", help="outside of --only, take what older code has found")
    options = parser.parse_args()
    wanted = [kind for kind in options.only.split(",") if kind] or list(KINDS)
    if options.again:
        shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / "code").write_text(code := _digest())
    _run([kind for kind in wanted if not KINDS[kind].missing and _kept(kind, code) is None], options.processes, code)
    shown = list(KINDS) if options.older else wanted
    found = {kind: _kept(kind, None if options.older else code) for kind in shown if not KINDS[kind].missing}
    findings = [finding for part in found.values() for finding in part or []]
    if options.write:
        stale = sum(part is not None and _kept(kind, code) is None for kind, part in found.items())
        write(options.write, findings, stale=stale)
    bad = [f for f in findings if f.verdict in ("wrong", "late", "crashed")]
    for finding in bad:
        print(f"{finding.kind}, {finding.case}: {finding.verdict}: {finding.sentence}")
    print(f"{len(findings)} cases of {len(found)} kinds, {len(bad)} not as they should be")
    return 1 if bad else 0


def _digest() -> str:
    """What a result depends on."""
    digest = hashlib.sha256(" ".join(version(package) for package in PACKAGES).encode())
    for folder in ("lorainit", "tests/zoo"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name not in ("__main__.py", "table.py", "test_zoo.py", "test_bases.py") or folder == "lorainit":
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _kept(kind: str, code: str | None) -> list[Finding] | None:
    """What is known of a kind, if this code has found it; None = any code."""
    path = KEPT / f"{kind}.json"
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    return [Finding.from_json(value) for value in kept["findings"]] if code in (None, kept["code"]) else None


def _run(kinds: list[str], processes: int, code: str) -> None:
    """Fork for each kind: torch and transformers are imported once."""
    torch.set_num_threads(1)
    gc.freeze()  # every job collects garbage, and what is imported is none
    fork = multiprocessing.get_context("fork")
    waiting, busy = list(kinds), dict[str, tuple[multiprocessing.process.BaseProcess, float]]()
    while waiting or busy:
        while waiting and len(busy) < processes:
            kind = waiting.pop(0)
            child = fork.Process(target=_one, args=(kind, code))
            child.start()
            busy[kind] = child, time.monotonic()
        for kind, (process, started) in list(busy.items()):
            process.join(0.2)
            if process.is_alive() and time.monotonic() - started > SECONDS[KINDS[kind].expected]:
                process.kill()
                process.join()
            if not process.is_alive():
                del busy[kind]
                _settle(kind, code, process.exitcode)
                print(f"{kind}: {time.monotonic() - started:.0f} s, {len(waiting)} to go", flush=True)


def _settle(kind: str, code: str, exitcode: int | None) -> None:
    """A process that died has found that, too."""
    if _kept(kind, code) is None:
        sentence = f"The process ended with {exitcode} (limits: {SECONDS[KINDS[kind].expected]} s, {BYTES >> 30} GiB)."
        _keep(kind, code, [Finding(kind, _cases(kind)[0], "crashed", sentence)])


def _keep(kind: str, code: str, findings: list[Finding]) -> None:
    part = KEPT / f"{kind}.part"
    part.write_text(json.dumps({"code": code, "findings": [f.as_json() for f in findings]}, indent=1) + "\n")
    part.rename(KEPT / f"{kind}.json")


def _cases(kind: str) -> list[Case]:
    return CASES if KINDS[kind].expected == "trains" else REFUSALS


def _one(kind: str, code: str) -> None:
    """In a process of its own: what it prints goes into a file beside its findings."""
    log = os.open(KEPT / f"{kind}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.disable(logging.WARNING)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as room:
        _keep(kind, code, examine({kind: _cases(kind)}, Path(room) / "zoo"))


if __name__ == "__main__":
    sys.exit(main())
