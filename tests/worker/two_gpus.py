"""The product's worker on a pretended machine with two GPUs, and, run as a program, its child.

The first GPU is broken as long as the file exists that `PRETENDED_BROKEN` names.
"""

import json
import os
import sys
import time
from pathlib import Path


def _is_broken() -> bool:
    return os.environ["CUDA_VISIBLE_DEVICES"] == "0" and Path(os.environ["PRETENDED_BROKEN"]).exists()


if __name__ == "__main__":
    if sys.argv[1:] == ["doctor", "--json"]:
        print(json.dumps({"machine": {"gpu_trouble": "It is still broken." if _is_broken() else None}}))
        sys.exit()
    from tests.worker import child_script

    if _is_broken():
        child_script.failed(0, "device_failed")
    else:
        time.sleep(1)  # so that the other slot gets the next job
        child_script.done(0)
else:
    from api.core.devices import examination
    from lorainit.system import gpus
    from worker import gpu_health
    from worker.app import app
    from worker.child import supervisor

    __all__ = ["app"]
    setattr(gpus, "list_visible", lambda: ["0", "1"])  # noqa: B010 - a plain assignment is no replacement to mypy
    setattr(gpus, "find_problem", lambda: None)  # noqa: B010
    setattr(gpus, "explain_no_gpu", lambda: None)  # noqa: B010
    supervisor.PROGRAM = examination.PROGRAM = (sys.executable, __file__)
    gpu_health.FIRST_WAIT = gpu_health.LONGEST_WAIT = 0.5
