"""`python -m lorainit doctor`: what a run would find on this machine, and which settings it would choose."""

import json
import os
from typing import Any

from lorainit.runtime import process_tuning, settings
from lorainit.system import driver, gpus


def examine() -> dict[str, Any]:
    """Set this process up as a run does, and return what was found and chosen: `machine`, `packages`, `choices`.

    Raises:
        DriverSilent: the NVIDIA driver does not answer. CUDA is not asked then, because it would wait for ever.
    """
    if not gpus.is_hidden():
        driver.list_gpus()
    process_tuning.tune_process()  # first, because torch reads some settings only when it is loaded
    from lorainit.runtime import devices

    choices = [
        {"name": c.name, "value": c.value, "why": c.why, "measured": dict(c.measured)} for c in settings.list_recorded()
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {**devices.describe_machine(), "usable_cpus": process_tuning.usable_cpus(), "memory_bytes": memory}
    facts |= {"gpus": gpus.list_visible(), "gpu_trouble": devices.explain_unusable_gpu() or devices.find_failing_gpu()}
    del facts["settings"]  # the choices, without their reasons
    return {"machine": facts, "packages": devices.package_versions(), "choices": choices}


def as_json(found: dict[str, Any]) -> str:
    """The report as JSON, for programs."""
    return json.dumps(found, indent=2)
