"""What `lorainit doctor` prints: a line for each check of the service, then what a run would find on this machine."""

import json
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.text import Text

from api.core.devices import devices
from api.core.devices.examination import Unanswered, examine
from api.core.maintenance import doctor
from api.core.maintenance.doctor import Check
from api.core.settings import BadSettings, get_settings
from lorainit.system.doctor_text import as_text

COLOURS = {"ok": "green", "failed": "red", "absent": "yellow"}


def run(out: Console, *, as_json: bool) -> bool:
    """Examine and print; False when a check failed."""
    checks = []
    for check in doctor.examine():
        checks.append(check)
        if not as_json:
            _print(out, check)
    check, machine = _devices()
    checks.append(check)
    if as_json:
        out.print(json.dumps({**doctor.as_json(checks), **machine}, indent=2))
    else:
        _print(out, check)
        out.print(f"\n{as_text(machine)}\n" if machine else "", end="")
    return all(check.status != "failed" for check in checks)


def _print(out: Console, check: Check) -> None:
    out.print(Text.assemble((f"{check.status:<7}", COLOURS[check.status]), f" {check.name}: {check.message}"))


def _devices() -> tuple[Check, dict[str, Any]]:
    """The check that a worker makes of its devices, and the report of a run's examination of this machine."""
    if find_spec("torch") is None:
        return Check("devices", "absent", "torch is not installed here; ask where the worker runs"), {}
    try:
        settings = get_settings()
    except BadSettings:
        return Check("devices", "absent", "they are not checked, because the settings cannot be read"), {}
    try:
        if hangs := devices.find_silence():
            return Check("devices", "failed", hangs), {}
        found = examine("" if settings.worker_device == "cpu" else None)
    except Unanswered as error:
        return Check("devices", "failed", str(error)), {}
    facts = found["machine"]
    if why := devices.find_problem(settings.worker_slots) or facts["gpu_trouble"]:
        return Check("devices", "failed", why), found
    why = "LORAINIT_WORKER_DEVICE is cpu" if settings.worker_device == "cpu" else "no GPU"
    return Check("devices", "ok", facts["gpu"] or f"{why}; runs go to the CPU"), found
