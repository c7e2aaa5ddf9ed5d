"""What `lorainit doctor` prints: a line for each check of the service, then what a run finds on this machine."""

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.text import Text

from api.core import doctor
from api.core.doctor import Check

COLOURS = {"ok": "green", "failed": "red", "absent": "yellow"}


def run(out: Console, *, as_json: bool) -> bool:
    """Examine and print; False when a check failed."""
    checks = []
    for check in doctor.examine():
        checks.append(check)
        if not as_json:
            _print(out, check)
    devices, machine = _devices()
    if as_json:
        report = doctor.as_json([*checks, devices])
        out.print(json.dumps({**report, **machine}, indent=2))
    else:
        _print(out, devices)
        out.print(_words() if machine else "", end="")
    return all(check.status != "failed" for check in [*checks, devices])


def _print(out: Console, check: Check) -> None:
    out.print(Text.assemble((f"{check.status:<7}", COLOURS[check.status]), f" {check.name}: {check.message}"))


def _devices() -> tuple[Check, dict[str, Any]]:
    """A run's own view of this machine, by a process of its own: this one loads no torch."""
    if find_spec("torch") is None:
        return Check("devices", "absent", "torch is not installed here; ask where the worker runs"), {}
    answer = subprocess.run(_command("--json"), capture_output=True, text=True, check=False)
    if answer.returncode:
        return Check("devices", "failed", answer.stderr.strip()[-300:] or "a run cannot start here"), {}
    found: dict[str, Any] = json.loads(answer.stdout)
    facts = found["machine"]
    if facts["gpu_trouble"]:
        return Check("devices", "failed", facts["gpu_trouble"]), found
    return Check("devices", "ok", facts["gpu"] or "no GPU; runs go to the CPU"), found


def _words() -> str:
    answer = subprocess.run(_command(), capture_output=True, text=True, check=False)
    return "\n" + answer.stdout


def _command(*options: str) -> list[str]:
    return [sys.executable, "-m", "lorainit", "doctor", *options]
