"""`python -m tests.pretended CASE FOLDER ...`: whole runs of the engine on the pretended GPU, each a line of JSON."""

import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

from tests.pretended import device, engine


def main(folder: Path, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    device.install()
    engine.install()
    from benchmarks.gpu.day import Day
    from tests.pretended.cases import CASES

    for name in names or CASES:
        day = Day.begun("cpu", folder=folder / name.replace(" ", "-"), tiny=True, seconds=1e6)
        day.folder.mkdir(parents=True)
        with device.switched_on() as tally:
            print(json.dumps({"case": name, "found": CASES[name](day), **asdict(tally)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
