"""`python -m lorainit doctor`: what a run would find and choose on this machine, in words or as JSON."""

import json
import os
from typing import Any

from lorainit import gpus, hardware, machine


def examine() -> dict[str, Any]:
    """Set this process up as a run does, and say what that was: `machine`, `packages` and `choices`."""
    machine.set_up()
    choices = [{"name": c.name, "value": c.value, "why": c.why, "measured": dict(c.measured)} for c in machine.report()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {**hardware.description(), "usable_cpus": machine.usable_cpus(), "memory_bytes": memory}
    facts |= {"gpus": gpus.visible(), "gpu_trouble": hardware.unusable_gpu() or hardware.failing_gpu()}
    del facts["settings"]  # the choices, without their reasons
    return {"machine": facts, "packages": hardware.versions(), "choices": choices}


def as_json(found: dict[str, Any]) -> str:
    """For programs."""
    return json.dumps(found, indent=2)


def as_text(found: dict[str, Any]) -> str:
    """For people: the machine, the packages, and one line per choice."""
    facts, packages = found["machine"], found["packages"]
    size = f"{facts['usable_cpus']} of {facts['cpus']} cores, {facts['memory_bytes'] / 2**30:.1f} GiB"
    lines = [
        f"{facts['platform']}, {size}",
        f"GPU: {_gpu(facts)}",
        ", ".join(f"{name} {number}" for name, number in packages.items() if number),
        "",
        *(f"{c['name']:<16} {c['value']}: {c['why']}" for c in found["choices"]),
    ]
    return "\n".join(lines)


def _gpu(facts: dict[str, Any]) -> str:
    if facts["gpu"]:
        names = ", ".join(facts["gpus"])
        return f"{facts['gpu']} (visible: {names}), driver {facts['driver']}, CUDA {facts['cuda']}"
    if facts["gpu_trouble"]:
        return f"no run is started: {facts['gpu_trouble']}"
    if facts["gpus"] and not facts["cuda"]:
        return "not used: the installed torch has no CUDA; runs go to the CPU"
    return "none; runs go to the CPU"
