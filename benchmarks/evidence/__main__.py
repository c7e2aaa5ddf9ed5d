"""Which claims about initializations hold? Measured with the service itself on GSM8K, written to docs/evidence.md.

    python -m benchmarks.evidence --data FOLDER [--state FOLDER] [--nice 19] [--only KEY ...]
    python -m benchmarks.evidence --page-only

It takes hours and can be stopped at any time: the same command goes on with what is left, a job that ran from its
checkpoint. What was measured is in docs/evidence/; `--page-only` writes page and pictures from it and measures nothing.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from benchmarks.evidence.measure import OtherRequest, measure
from benchmarks.evidence.plan import STUDIES
from benchmarks.evidence.rows import write_rows
from benchmarks.evidence.service import NoService, run_service
from benchmarks.train_page import machine

ROOT = Path(__file__).parents[2]


def main() -> int:
    options = _read_options()
    if options.page_only:
        return 0
    os.nice(options.nice)
    signal.signal(signal.SIGTERM, _stop)
    try:
        rows = write_rows(options.data, options.state / "rows")
        with run_service(options.state) as service:
            studies = [study for study in STUDIES if not options.only or study.key in options.only]
            measure(service, studies, rows, options.results, report=_say, machine=machine(), nice=os.nice(0))
    except (NoService, OtherRequest, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        _say("stopped; the same command goes on")
        return 130
    return 0


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, flush=True)


def _read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--state", type=Path, default=ROOT / ".state" / "evidence", help="folder of the service")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "evidence", help="folder of what was measured")
    parser.add_argument("--only", nargs="+", choices=[study.key for study in STUDIES], help="these experiments")
    parser.add_argument("--nice", type=int, default=0, help="run at a lower priority, up to 19")
    parser.add_argument("--page-only", action="store_true", help="measure nothing: write the page from what there is")
    options = parser.parse_args()
    if options.data is None and not options.page_only:
        parser.error("say where GSM8K's train.jsonl and test.jsonl are: --data FOLDER")
    return options


if __name__ == "__main__":
    sys.exit(main())
