"""`python -m tests.pretended DEVICE FOLDER CASE ...`: whole runs of the engine, each a line of JSON.

DEVICE is "pretended", "cuda", or "cpu" to try what the cases for CUDA ask. A case that fails is told; one that leaves a
GPU in disorder ends the process, and what comes after it is left to another.
"""

import gc
import json
import sys
import traceback
import warnings
from contextlib import nullcontext
from pathlib import Path

from tests.pretended import device, engine


def main(kind: str, folder: Path, names: list[str]) -> int:
    warnings.simplefilter("ignore")
    if kind == "pretended":
        device.install()
        engine.install()
    from benchmarks.gpu.day import Day
    from tests.pretended.cases import cases_on

    gc.freeze()  # a run collects garbage, and need not look at all that was imported
    for name in names:
        day = Day.begun(
            "cuda" if kind == "cuda" else "cpu", folder=folder / name.replace(" ", "-"), tiny=True, seconds=1e6
        )
        day.folder.mkdir(parents=True)
        error = None
        with device.switched_on() if kind == "pretended" else nullcontext():
            try:
                found = cases_on(kind)[name](day)
            except Exception as caught:
                traceback.print_exc()
                error, found = caught, f"**{type(caught).__name__}: {' '.join(str(caught).split())[:400]}**"
        print(json.dumps({"case": name, "found": found}), flush=True)
        if error is not None and "CUDA error" in str(error):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
