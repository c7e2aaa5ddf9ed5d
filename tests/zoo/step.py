"""Loss and gradients of one training step beside stock transformers and stock PEFT.

An optimizer is put in the run's place that leaves the gradients in the adapter, so that what is exported next is the
gradient by the names of PEFT's files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from lorainit.config.events import Event, Metrics
from lorainit.data.reader import load
from lorainit.model.load import load_tokenizer
from lorainit.run import run
from lorainit.train import adapter_trainer
from tests.lorainit.conftest import only_training
from tests.zoo import stock
from tests.zoo.bases import KINDS
from tests.zoo.finding import BF16, EXACT, Tried
from tests.zoo.jobs import spec_for
from tests.zoo.kind import MAX_LENGTH

Rows = list[tuple[Tensor, Tensor]]


class _Reveal(torch.optim.Optimizer):
    """First moves everything at random, so that A and B have gradients; then leaves the gradients in their places."""

    def __init__(self, layers: Mapping[str, Any]) -> None:
        super().__init__(
            [p for layer in layers.values() for p in layer.trained_parameters().values()], {"factor": 1.0, "lr": 0.0}
        )
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


def one_step(tried: Tried, source: Path, rows: Path, out: Path, events: list[Event]) -> None:
    """The second step's, at the adapter of the first checkpoint."""
    finding, precision = tried.finding, tried.finding.case.precision
    spec = spec_for(finding.case, source, rows, max_steps=2, checkpoint_interval=1, max_grad_norm=None)
    with only_training(), mock.patch.object(adapter_trainer, "make_optimizer", lambda recipe, layers: _Reveal(layers)):
        run(spec, out, events.append)
    loss = next(event.train_loss for event in events if isinstance(event, Metrics) and event.step == 2)
    start, after = (out / "checkpoints" / f"step-{n:06d}" / "adapter" for n in (1, 2))
    ours = load_file(after / "adapter_model.safetensors")
    samples = load(rows, load_tokenizer(source), max_length=MAX_LENGTH).samples
    masked = [(sample.ids.long(), sample.trained) for sample in samples]
    attention = KINDS[finding.kind].attention
    exact, expected = _stock_step(source, start, "fp32", attention, masked)
    assert loss is not None
    numbers = {"loss": abs(loss - exact) / exact, "gradients": relative(ours, expected)}
    if precision == "bf16":
        rough, gradients = _stock_step(source, start, "bf16", attention, masked)
        numbers |= {"stock loss": abs(rough - exact) / exact, "stock gradients": relative(gradients, expected)}
    finding.numbers = numbers
    worst = max(expected, key=lambda name: relative({name: ours.get(name, expected[name] * 0)}, expected, name))
    finding.facts["worst"] = worst
    if set(ours) != set(expected):
        finding.verdict, finding.sentence = "wrong", "Stock PEFT has other tensors than the download."
        return
    for name in ("loss", "gradients"):
        # A loss is a single number, whose rounding may be small by chance: the last bit of bf16 is always allowed.
        allowed = EXACT if precision == "fp32" else max(BF16 * numbers[f"stock {name}"], 2**-8)
        if not numbers[name] <= allowed:
            finding.verdict = "wrong"
            finding.sentence += f"The {name} of one step differ by {numbers[name]:.2g} (allowed {allowed:.2g}). "


def _stock_step(
    base: Path, adapter: Path, precision: str, attention: str, rows: Rows
) -> tuple[float, dict[str, Tensor]]:
    return stock.loss_and_gradients(stock.load_adapted(base, adapter, precision, attention), rows)


def relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *only: str) -> float:
    """Norm of the difference of all tensors, or of these, relative to the expected."""
    names = [name for name in only or expected if name in found]
    off = sum(float((found[n].double() - expected[n].double()).square().sum()) for n in names)
    size = sum(float(expected[n].double().square().sum()) for n in names)
    return (off / size) ** 0.5 if size else float(off > 0)
