"""Which claims about initializations hold? Measured with the service itself on GSM8K, written to docs/evidence.md.

    python -m benchmarks.evidence --data FOLDER [--state FOLDER] [--docs FOLDER] [--nice 19] [--only KEY ...]
    python -m benchmarks.evidence --page-only [--docs FOLDER]

It takes hours and can be stopped at any time: the same command goes on with what is left, a job that ran from its
checkpoint. What was measured is in docs/evidence/. `--page-only` writes page and pictures from it and measures nothing.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from benchmarks.evidence.evidence import load_evidence
from benchmarks.evidence.measure import OtherRequest, Where, measure
from benchmarks.evidence.page import make_page
from benchmarks.evidence.pictures import draw_pictures
from benchmarks.evidence.plan import STUDIES
from benchmarks.evidence.rows import write_rows
from benchmarks.evidence.service import NoService, run_service
from benchmarks.train_page import machine

ROOT = Path(__file__).parents[2]


def main() -> int:
    """The exit code: 0 when everything asked for was measured, 130 when somebody stopped it."""
    options = _read_options()
    if options.page_only:
        write_page(options.docs)
        return 0
    signal.signal(signal.SIGTERM, _stop)
    try:
        _measure(options)
    except (NoService, OtherRequest, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        _say("stopped; the same command goes on")
        return 130
    finally:
        write_page(options.docs)
    return 0


def _measure(options: argparse.Namespace) -> None:
    os.nice(options.nice)
    where = Where(machine(), os.nice(0))
    rows = write_rows(options.data, options.state / "rows")
    with run_service(options.state, nice=options.nice) as service:
        for study in STUDIES:
            if not options.only or study.key in options.only:
                measure(service, study, rows, options.docs / "evidence", report=_say, where=where)
                write_page(options.docs)


def write_page(docs: Path) -> None:
    """Write docs/evidence.md and its pictures from what there is."""
    evidence = load_evidence(docs / "evidence")
    pictures = draw_pictures(evidence, docs / "evidence")
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "evidence.md").write_text(make_page(evidence, pictures))


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, flush=True)


def _read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--state", type=Path, default=ROOT / ".state" / "evidence", help="folder of the service")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page and of what was measured")
    parser.add_argument("--only", nargs="+", choices=[study.key for study in STUDIES], help="these experiments")
    parser.add_argument("--nice", type=int, default=0, help="give way to other programs, 19 the most")
    parser.add_argument("--page-only", action="store_true", help="measure nothing: write the page from what there is")
    options = parser.parse_args()
    if options.data is None and not options.page_only:
        parser.error("say where GSM8K's train.jsonl and test.jsonl are: --data FOLDER")
    return options


if __name__ == "__main__":
    sys.exit(main())
