"""The product's worker; its child is the trainer of the chaos run, except for jobs on a real base."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.chaos import mutants
from worker import tasks
from worker.app import app
from worker.child import supervisor
from worker.child.supervisor import Outcome, RunPaths

__all__ = ["app"]

STUB = "stub"
_TRAINER = (sys.executable, "-I", "-S", str(Path(__file__).with_name("trainer.py")))


def _run_child(places: Sequence[RunPaths], **others: Any) -> Outcome:
    stub = json.loads(places[0].spec.read_text())["model"]["id"] == STUB
    return supervisor.run_child(places, **others, **({"program": _TRAINER} if stub else {}))


tasks.run_child = _run_child
mutants.apply()
