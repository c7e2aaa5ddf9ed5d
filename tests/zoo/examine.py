"""The examination: what Lorainit makes of a kind of base, beside what stock transformers and PEFT make of it.

A job is tried from outside, through `lorainit.run.run`. Only two things are looked at inside: what the trained
model says before it is let go of, and the gradients of a step, for which an optimizer is put in its place that
leaves them in the adapter, so that the download is the gradient by the names of PEFT's files.
"""

import json
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from lorainit import course, delivery
from lorainit.errors import LorainitError
from lorainit.events import Event, Message, Metrics, Plan
from lorainit.inspect import inspect
from lorainit.layer import borrowed
from lorainit.run import run
from lorainit.spec import RunSpec
from tests.zoo import stock
from tests.zoo.bases import KINDS, make
from tests.zoo.finding import ENGINE, INSPECT, Case, Finding
from tests.zoo.kind import MAX_LENGTH

ROOT = Path(__file__).parents[2]
# Largest relative difference that is rounding in fp32.
EXACT = 1e-4
# In bf16 nothing is exact: our error may be so many times that of stock bf16 against stock fp32.
BF16 = 2.0
# A refusal that takes longer is none for somebody who waits for it.
PATIENCE_SECONDS = 20.0
SMALL: dict[str, dict[str, Any]] = {
    "lora_one": {"samples": 4},
    "eva": {"samples": 4},
    "corda": {"samples": 4},
    "hrp": {"preheat_rank": 8, "preheat_steps": 4},
}
# Letters of a row's prompt and of its answer; tokens are about as many. Shorter than every window of the zoo, as
# long as one, and several times as long.
LENGTHS = [(3, 4), (4, 8), (5, 14), (6, 22), (12, 30), (20, 45), (30, 80)]


def examine(cases: Mapping[str, Sequence[Case]], room: Path) -> list[Finding]:
    """Try the cases of each kind; the downloads of all are read in one new process.

    Args:
        room: an empty folder for bases and downloads.
    """
    room.mkdir(parents=True, exist_ok=True)
    rows = write_rows(room / "rows.jsonl")
    tried = [_try(kind, case, room, rows) for kind, wanted in cases.items() for case in wanted]
    _read_downloads([one for one in tried if one.adapter], room / "readings")
    return [one.finding for one in tried]


def write_rows(path: Path) -> Path:
    """A training file of random words."""
    rng = random.Random(0)

    def words(n: int) -> str:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(n))

    rows = [{"prompt": words(before), "completion": words(after)} for before, after in LENGTHS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass
class _Tried:
    """A case under way; `adapter`: a download that is still to be read, `rows` and `trained`: what it should say."""

    finding: Finding
    base: Path | None = None
    adapter: Path | None = None
    rows: list[Tensor] = field(default_factory=list)
    trained: list[Tensor] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)


def _try(kind: str, case: Case, room: Path, rows: Path) -> _Tried:
    out = room / kind / f"{case}".replace(" ", "-")
    tried = _Tried(Finding(kind, case, "works"))
    events: list[Event] = []
    started = time.monotonic()
    base = room / kind / "base"
    source = make(kind, base) if not base.exists() else next(iter(base.glob("*.gguf")), base)
    tried.base = base
    try:
        if case.what == INSPECT:
            _inspect(tried.finding, source, room)
        elif case.what == ENGINE:
            _engine(tried, _spec(source, rows, "kaiming", case, steps=2), out, events)
        else:
            _job(tried, _spec(source, rows, case.what, case, steps=4), out, events)
    except LorainitError as error:
        late = any(isinstance(event, Metrics) for event in events)
        tried.finding.verdict, tried.finding.code = "late" if late else "refused", error.code
        tried.finding.sentence = error.message
    except Exception as error:
        tried.finding.verdict, tried.finding.sentence = "crashed", _last_line(error)
        tried.finding.facts["traceback"] = traceback.format_exc()[-4000:]
    tried.finding.facts |= _facts(events)
    tried.finding.seconds = round(time.monotonic() - started, 2)
    return tried


def _last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:300]


def _facts(events: Sequence[Event]) -> dict[str, Any]:
    facts: dict[str, Any] = {"warnings": []}
    for event in events:
        if isinstance(event, Message) and event.data and event.data.get("kind") == "machine" and "rows" in event.data:
            facts |= {"rows": event.data["rows"], "why": event.message.partition(": ")[2]}
        if isinstance(event, Message) and event.level == "warn":
            facts["warnings"].append(event.message)
        if isinstance(event, Plan):
            facts |= {"modules": event.modules, "target_modules": event.target_modules}
    return facts


# --- inspect ------------------------------------------------------------------------------------


def _inspect(finding: Finding, source: Path, room: Path) -> None:
    started = time.monotonic()
    try:
        found = inspect(str(source), cache=room / "cache")
    finally:
        if (seconds := time.monotonic() - started) > PATIENCE_SECONDS:
            finding.verdict, finding.sentence = "wrong", f"inspect took {seconds:.0f} s."
    finding.facts["targets"] = [target.model_dump() for target in found.targets]
    finding.facts["quantization"] = found.quantization
    if KINDS[finding.kind].expected == "refused":
        finding.verdict, finding.sentence = "wrong", "It was accepted."


# --- jobs ---------------------------------------------------------------------------------------


def _spec(source: Path, rows: Path, method: str, case: Case, *, steps: int) -> RunSpec:
    nf4 = case.precision == "nf4"
    return RunSpec.model_validate(
        {
            "model": {"id": "zoo", "source": str(source), "root": "tests/zoo", "max_length": MAX_LENGTH},
            "data": {"training": str(rows)},
            "lora": {
                "init": {"method": method, **SMALL.get(method, {})},
                "r": 4,
                "quantization": "nf4" if nf4 else None,
            },
            "training": {
                "max_steps": steps,
                "batch_size": len(LENGTHS),
                "learning_rate": 1e-2,
                "max_length": MAX_LENGTH,
                "checkpoint_interval": 1 if steps == 2 else steps,
                "max_grad_norm": None if steps == 2 else 1.0,
                "precision": "fp32" if nf4 else case.precision,
                "compile": False,
            },
            "micro_batch_size": len(LENGTHS),
        }
    )


def _job(tried: _Tried, spec: RunSpec, out: Path, events: list[Event]) -> None:
    """A whole job; its download is read later, in a new process."""
    with _witness(tried):
        done = run(spec, out, events.append)
    tried.adapter = Path(done.adapter)


@contextmanager
def _witness(tried: _Tried) -> Iterator[None]:
    """Write down what the trained model, and the base in its place, says of the training rows."""
    verify = delivery.verify

    def watched(job: Any, *args: Any, **named: Any) -> Any:
        tried.rows = [sample.ids.long() for sample in job.data.samples]
        tried.before = stock.logits(job.base.model, tried.rows)
        with borrowed(job.base.model, job.layers):
            tried.trained = stock.logits(job.base.model, tried.rows)
        return verify(job, *args, **named)

    with mock.patch.object(delivery, "verify", watched):
        yield


# --- one step's loss and gradients --------------------------------------------------------------


class _Reveal(torch.optim.Optimizer):
    """First moves everything at random, so that A and B have gradients; then leaves the gradients in their places."""

    def __init__(self, layers: Mapping[str, Any]) -> None:
        super().__init__([p for layer in layers.values() for p in layer.trained().values()], {"factor": 1.0, "lr": 0.0})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        generator = torch.Generator().manual_seed(0)
        for parameter in self.param_groups[0]["params"]:
            if self.steps == 0:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
            else:
                parameter.copy_(parameter.grad)
        self.steps += 1


def _engine(tried: _Tried, spec: RunSpec, out: Path, events: list[Event]) -> None:
    finding, base, precision = tried.finding, Path(spec.model.source), tried.finding.case.precision
    with mock.patch.object(course, "make_optimizer", lambda recipe, layers: _Reveal(layers)), _witness(tried):
        run(spec, out, events.append)
    loss = next(event.train_loss for event in events if isinstance(event, Metrics) and event.step == 2)
    start, after = (out / "checkpoints" / f"step-{n:06d}" / "adapter" for n in (1, 2))
    ours = load_file(after / "adapter_model.safetensors")
    rows = _masked_rows(spec, base)
    exact, expected = _stock_step(base, start, "fp32", rows)
    assert loss is not None
    numbers = {"loss": abs(loss - exact) / exact, "gradients": _relative(ours, expected)}
    if precision == "bf16":
        rough, gradients = _stock_step(base, start, "bf16", rows)
        numbers |= {"stock loss": abs(rough - exact) / exact, "stock gradients": _relative(gradients, expected)}
    finding.numbers = numbers
    if set(ours) != set(expected):
        finding.verdict, finding.sentence = "wrong", "Stock PEFT has other tensors than the download."
        return
    for name in ("loss", "gradients"):
        # One step's loss is a single number, whose rounding may be small by chance: a bf16 mantissa is allowed.
        allowed = EXACT if precision == "fp32" else max(BF16 * numbers[f"stock {name}"], 2**-8)
        if not numbers[name] <= allowed:
            finding.verdict = "wrong"
            finding.sentence += f"The {name} of one step differ by {numbers[name]:.2g} (allowed {allowed:.2g}). "
    worst = max(ours, key=lambda name: _relative({name: ours[name]}, {name: expected[name]}))
    finding.facts["worst"] = [worst, _relative({worst: ours[worst]}, {worst: expected[worst]})]


def _masked_rows(spec: RunSpec, base: Path) -> list[tuple[Tensor, Tensor]]:
    from lorainit.data import load
    from lorainit.model.load import load_tokenizer

    samples = load(spec.data.training, load_tokenizer(base), max_length=MAX_LENGTH).samples
    return [(sample.ids.long(), sample.trained) for sample in samples]


def _stock_step(base: Path, adapter: Path, precision: str, rows: Any) -> tuple[float, dict[str, Tensor]]:
    return stock.loss_and_gradients(stock.load_adapted(base, adapter, precision), rows)


def _relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Norm of the difference of all tensors, relative to the expected."""
    names = [name for name in expected if name in found]
    off = sum(float((found[n].double() - expected[n].double()).square().sum()) for n in names)
    size = sum(float(expected[n].double().square().sum()) for n in names)
    return (off / size) ** 0.5 if size else float(off > 0)


# --- downloads in a new process ------------------------------------------------------------------


def _read_downloads(tried: Sequence[_Tried], folder: Path) -> None:
    if not tried:
        return
    folder.mkdir(parents=True)
    readings = [
        {
            "base": str(one.base),
            "adapter": str(one.adapter),
            "precision": one.finding.case.precision,
            "rows": [row.tolist() for row in one.rows],
        }
        for one in tried
    ]
    (folder / "readings.json").write_text(json.dumps(readings))
    command = [sys.executable, "-m", "tests.zoo.stock", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    for number, one in enumerate(tried):
        _compare(one, folder / f"{number}.safetensors", folder / f"{number}.error", done.stderr)


def _compare(one: _Tried, found: Path, failed: Path, stderr: str) -> None:
    finding = one.finding
    if not found.exists():
        why = failed.read_text() if failed.exists() else stderr
        finding.verdict, finding.sentence = "wrong", f"Stock PEFT cannot read it: {why.strip().splitlines()[-1][:300]}"
        return
    said = load_file(found)
    finding.numbers["share"] = float(said["share"])
    rows = range(len(one.rows))
    read = torch.cat([said[f"{i}"] for i in rows])
    trained, before = torch.cat(one.trained), torch.cat(one.before)
    if finding.case.precision == "bf16":
        # By the middle token: a mixture routes some tokens differently in every two computations in bf16.
        exact = torch.cat([said[f"exact.{i}"] for i in rows])
        off, allowed = _middle(trained, exact), BF16 * _middle(read, exact)
        did = _middle(trained, before)
    else:
        off, allowed, did = _far(trained, read), EXACT, _far(trained, before)
    finding.numbers |= {"logits": off, "allowed": allowed, "training did": did}
    if not off <= allowed:
        finding.verdict, finding.sentence = "wrong", f"Stock PEFT's logits differ by {off:.2g} (allowed {allowed:.2g})."
    elif not did > off:
        finding.verdict, finding.sentence = "wrong", f"The training changed the logits by {did:.2g} only."


def _far(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _middle(one: Tensor, other: Tensor) -> float:
    """The median token's relative difference."""
    return float(((one - other).norm(dim=1) / other.norm(dim=1)).median())
