"""The examination: what Lorainit makes of a kind of base, beside what stock transformers and PEFT make of it.

A job is tried from outside, through `lorainit.run.run`, and its download in a process that knows only stock PEFT.
"""

import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorainit.config.errors import LorainitError
from lorainit.config.events import Event, Message, Metrics, Plan
from lorainit.model.inspect import inspect
from tests.zoo.bases import KINDS, make
from tests.zoo.downloads import read_downloads
from tests.zoo.finding import ENGINE, INSPECT, Case, Finding, Tried
from tests.zoo.jobs import whole_job, write_rows
from tests.zoo.step import one_step

# Of a processor, so that a busy machine changes nothing: a refusal that takes longer is none for somebody who waits.
PATIENCE_SECONDS = 20.0


def examine(cases: Mapping[str, Sequence[Case]], room: Path) -> list[Finding]:
    """Try the cases of each kind; the downloads of all are read in one new process.

    Args:
        room: an empty folder for bases and downloads.
    """
    room.mkdir(parents=True, exist_ok=True)
    rows = write_rows(room / "rows.jsonl")
    tried = [_try(kind, case, room, rows) for kind, wanted in cases.items() for case in wanted]
    read_downloads([one for one in tried if one.adapter], room / "readings")
    return [one.finding for one in tried]


def _try(kind: str, case: Case, room: Path, rows: Path) -> Tried:
    base, out = room / kind / "base", room / kind / f"{case}".replace(" ", "-")
    source = make(kind, base) if not base.exists() else next(iter(base.glob("*.gguf")), base)
    tried = Tried(Finding(kind, case, "works"), base)
    events: list[Event] = []
    started = time.monotonic()
    try:
        if case.what == INSPECT:
            _inspect(tried.finding, source, room)
        elif case.what == ENGINE:
            one_step(tried, source, rows, out, events)
        else:
            whole_job(tried, source, rows, out, events)
    except LorainitError as error:
        _refused(tried.finding, error, events)
    except Exception as error:
        tried.finding.verdict, tried.finding.sentence = "crashed", _in_words(error)
        tried.finding.facts["traceback"] = traceback.format_exc()[-4000:]
    tried.finding.facts |= _facts(events)
    tried.finding.seconds = round(time.monotonic() - started, 2)
    return tried


def _inspect(finding: Finding, source: Path, room: Path) -> None:
    started = time.process_time()
    try:
        found = inspect(str(source), cache=room / "cache")
    finally:
        if (seconds := time.process_time() - started) > PATIENCE_SECONDS:
            raise TimeoutError(f"inspect took {seconds:.0f} s")
    finding.facts["targets"] = [target.model_dump() for target in found.targets]
    finding.facts["quantization"] = found.quantization
    if KINDS[finding.kind].expected == "refused":
        finding.verdict, finding.sentence = "wrong", "It was accepted."


def _refused(finding: Finding, error: LorainitError, events: Sequence[Event]) -> None:
    late = any(isinstance(event, Metrics) for event in events)
    finding.verdict, finding.code, finding.sentence = "late" if late else "refused", error.code, error.message
    if error.code == LorainitError.code:
        finding.verdict = "crashed"


def _in_words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _facts(events: Sequence[Event]) -> dict[str, Any]:
    facts: dict[str, Any] = {"warnings": []}
    for event in events:
        if isinstance(event, Message) and event.data and event.data.get("kind") == "machine" and "rows" in event.data:
            facts |= {"rows": event.data["rows"], "why": event.message.partition(": ")[2]}
        if isinstance(event, Message) and event.level == "warn":
            facts["warnings"].append(event.message)
        if isinstance(event, Plan):
            facts |= {"modules": event.modules, "target_modules": event.target_modules}
            facts["left_out"] = {layer.name: layer.reason for layer in event.left_out}
    return facts
