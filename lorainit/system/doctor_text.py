"""The report of `python -m lorainit doctor` as text; here because `lorainit doctor` uses it too and loads no torch."""

from typing import Any


def as_text(found: dict[str, Any]) -> str:
    """The report for people: the machine, the packages, and one line for each setting."""
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
    if facts["gpu_trouble"]:
        which = f"{facts['gpu']}: " if facts["gpu"] else ""
        return f"{which}no run is started: {facts['gpu_trouble']}"
    if facts["gpu"]:
        names = ", ".join(facts["gpus"])
        return f"{facts['gpu']} (visible: {names}), driver {facts['driver']}, CUDA {facts['cuda']}"
    if facts["gpus"] and not facts["cuda"]:
        return "not used: the installed torch has no CUDA; runs go to the CPU"
    return "none; runs go to the CPU"
