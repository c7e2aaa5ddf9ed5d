"""Jobs on a base of the zoo, run from outside; the trained model is asked what it says before it is let go of."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from lorainit.config.events import Event
from lorainit.config.spec import RunSpec
from lorainit.export import outputs
from lorainit.model.layers.layer import attach_temporarily
from lorainit.run import run
from tests.zoo import stock
from tests.zoo.finding import Case, Tried
from tests.zoo.kind import MAX_LENGTH

SMALL: dict[str, dict[str, Any]] = {
    "lora_one": {"samples": 4},
    "eva": {"samples": 4},
    "corda": {"samples": 4},
    "hrp": {"preheat_rank": 8, "preheat_steps": 4},
}
# Letters of a row's prompt and of its answer; tokens are about as many. Shorter than every window of the zoo, as
# long as one, and several times as long.
LENGTHS = [(3, 4), (4, 8), (5, 14), (6, 22), (12, 30), (20, 45), (30, 80)]


def write_rows(path: Path) -> Path:
    """A training file of random words."""
    rng = random.Random(0)

    def words(n: int) -> str:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(n))

    rows = [{"prompt": words(before), "completion": words(after)} for before, after in LENGTHS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def spec_for(case: Case, source: Path, rows: Path, **training: Any) -> RunSpec:
    """Every row in every step; by default four steps."""
    nf4 = case.precision == "nf4"
    method = "kaiming" if training else case.what
    lora = {"init": {"method": method, **SMALL.get(method, {})}, "r": 4, "quantization": "nf4" if nf4 else None}
    recipe = {
        "max_steps": 4,
        "checkpoint_interval": 4,
        "batch_size": len(LENGTHS),
        "learning_rate": 1e-2,
        "max_length": MAX_LENGTH,
        "precision": "fp32" if nf4 else case.precision,
        "compile": False,
    }
    return RunSpec.model_validate(
        {
            "model": {"id": "zoo", "source": str(source), "root": "tests/zoo", "max_length": MAX_LENGTH},
            "data": {"training": str(rows)},
            "lora": lora,
            "training": recipe | training,
            "micro_batch_size": len(LENGTHS),
        }
    )


def whole_job(tried: Tried, source: Path, rows: Path, out: Path, events: list[Event]) -> None:
    """Train for a few steps; the download is read later, in a new process."""
    spec = spec_for(tried.finding.case, source, rows)
    with _witness(tried):
        done = run(spec, out, events.append)
    tried.adapter = Path(done.adapter)


@contextmanager
def _witness(tried: Tried) -> Iterator[None]:
    """Write down what the trained model, and the base in its place, says of the training rows."""
    observe = outputs.observe_adapter

    def watched(job: Any, *args: Any, **named: Any) -> Any:
        tried.rows = [sample.ids.long() for sample in job.data.samples]
        tried.before = stock.logits(job.base.model, tried.rows)
        with attach_temporarily(job.base.model, job.layers):
            tried.trained = stock.logits(job.base.model, tried.rows)
        return observe(job, *args, **named)

    with mock.patch.object(outputs, "observe_adapter", watched):
        yield
