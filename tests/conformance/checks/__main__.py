"""The numbered checks, run inside a client's own environment against a running server.

    python tests/conformance/checks config.json [numbers]

prints {"number": {"ok": bool, "seen": {...}, "why": text}}. Only the client and the standard library
are imported. `seen` holds no ids and no times, so that the transcripts of three client versions can
be compared word for word.
"""

import json
import sys
import time
import traceback

import experiments
import files
import jobs
import models
import retries
import stream
import transport
from harness import CHECKS, Seen

MODULES = (transport, experiments, files, jobs, retries, models, stream)  # importing them fills CHECKS


def run(number: str) -> Seen:
    started = time.time()
    try:
        outcome = {"ok": True, "seen": CHECKS[number](), "why": ""}
    except Exception:
        outcome = {"ok": False, "seen": {}, "why": traceback.format_exc()}
    print(f"{number}: {time.time() - started:.1f} s {outcome['why']}", file=sys.stderr, flush=True)
    return outcome


if __name__ == "__main__":
    wanted = sys.argv[2:] or sorted(CHECKS, key=int)
    print(json.dumps({number: run(number) for number in wanted}))
