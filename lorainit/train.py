"""The training loop, top to bottom.

Plain on purpose: one optimizer, one loop. What it logs is on disk before a
checkpoint that contains it; what it minimizes does not depend on how a batch is cut into pieces.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorainit.checkpoint import Progress, Restored, write
from lorainit.data import Dataset, batches, collate, order
from lorainit.errors import NonFiniteLoss
from lorainit.events import Checkpoint, Event, Metrics, Stage, Tick
from lorainit.layer import LoRALinear, adapted
from lorainit.loss import tally
from lorainit.optimizers import make_optimizer, set_rate
from lorainit.resolve import steps_per_epoch, total_steps
from lorainit.spec import Hyperparameters

_CHECKPOINT_METRICS = (
    "step",
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)


def train(
    model: nn.Module,
    data: Dataset,
    valid: Dataset | None,
    recipe: Hyperparameters,
    *,
    out: Path,
    seed: int,
    micro_batch_size: int,
    pad: int,
    checkpoint_recipe: dict[str, Any],
    write_adapter: Callable[[Path], None],
    skip: int = 0,
    resumed: Restored | None = None,
    on_event: Callable[[Event], None],
) -> Progress:
    """Train the adapter of `model` in place.

    Args:
        recipe: resolved (no "auto" left).
        out: gets `metrics.jsonl` and `checkpoints/step-NNNNNN`.
        micro_batch_size: rows per forward pass; changes speed and memory, not the gradient.
        pad: the padding token's id.
        skip: batches of the data's order that are passed over before the first step.
        checkpoint_recipe, write_adapter: see `checkpoint.write`.

    Raises:
        NonFiniteLoss: the loss or the gradient norm is NaN or infinite.
    """
    assert recipe.batch_size != "auto" and recipe.learning_rate is not None
    assert recipe.eval_interval != "auto" and recipe.checkpoint_interval != "auto"
    device = next(model.parameters()).device
    total = total_steps(recipe, rows=len(data.samples))
    per_epoch = steps_per_epoch(len(data.samples), recipe.batch_size)
    per_step = math.ceil(min(recipe.batch_size, len(data.samples)) / micro_batch_size)
    warmup = math.ceil(recipe.warmup_ratio * total)
    layers = adapted(model)
    parameters = [p for layer in layers.values() for p in layer.trained().values()]
    optimizer = make_optimizer(recipe, layers)
    log = out / "metrics.jsonl"

    first, tokens, before = 0, 0, 0.0
    if resumed:
        resumed.restore(model, optimizer)
        first, tokens, before = resumed.progress.step, resumed.progress.tokens, resumed.progress.seconds
        log.write_bytes((resumed.folder / log.name).read_bytes())
    else:
        log.write_bytes(b"")
    started = time.monotonic()
    shuffled: tuple[int, list[int]] = (-1, [])

    def say(metrics: Metrics) -> None:
        with log.open("a") as stream:
            stream.write(json.dumps(metrics.model_dump(exclude={"kind"})) + "\n")
        on_event(metrics)

    if valid and not resumed:
        found = evaluate(model, valid, size=micro_batch_size, pad=pad, on_event=on_event)
        say(Metrics(step=0, total_steps=total, epoch=0, tokens=0, seconds=time.monotonic() - started, **found))
    on_event(Stage(stage="training", message=f"Training: {total} steps, {per_epoch} per epoch"))

    for step in range(first + 1, total + 1):
        begun = time.monotonic()
        epoch, position = divmod(skip + step - 1, per_epoch)
        if shuffled[0] != epoch:
            shuffled = epoch, order(data, seed=seed, epoch=epoch)
        start = position * recipe.batch_size
        samples = [data.samples[i] for i in shuffled[1][start : start + recipe.batch_size]]
        pieces = batches(samples, micro_batch_size)
        wanted = sum(int(s.trained[1:].sum()) for s in samples)
        seen = sum(len(s.ids) for s in samples)

        _train_mode(layers, on=True)
        loss, correct = 0.0, 0
        for done, piece in enumerate(pieces, start=1):
            batch = collate(piece, pad=pad).to(device)
            part = tally(model, batch)
            torch.autograd.backward(part.loss / wanted)
            loss += float(part.loss.detach()) / wanted
            correct += part.correct
            on_event(Tick(done=(step - 1) * per_step + done, total=total * per_step))
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm or math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLoss(
                f"Step {step}: loss {loss}, gradient norm {norm}. A lower learning rate usually helps.",
                param="method.supervised.hyperparameters.learning_rate",
            )
        rate = recipe.learning_rate * schedule(recipe.lr_scheduler, step - 1, total=total, warmup=warmup)
        set_rate(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad()
        _train_mode(layers, on=False)
        tokens += seen
        speed = seen / (time.monotonic() - begun)

        found = {}
        last = step == total
        if valid and (last or step % recipe.eval_interval == 0):
            found = evaluate(model, valid, size=micro_batch_size, pad=pad, on_event=on_event)
            if not last:
                on_event(Stage(stage="training", message="Training goes on"))
        metrics = Metrics(
            step=step,
            total_steps=total,
            epoch=step / per_epoch,
            tokens=tokens,
            seconds=before + time.monotonic() - started,
            train_loss=loss,
            train_mean_token_accuracy=correct / wanted,
            learning_rate=rate,
            grad_norm=norm,
            tokens_per_second=speed,
            **found,
        )
        say(metrics)

        if last or step % recipe.checkpoint_interval == 0:
            progress = Progress(step, tokens, before + time.monotonic() - started)
            folder = out / "checkpoints" / f"step-{step:06d}"
            write(
                folder,
                model,
                optimizer,
                progress=progress,
                recipe=checkpoint_recipe,
                metrics=log,
                write_adapter=write_adapter,
            )
            shown = {name: getattr(metrics, name) for name in _CHECKPOINT_METRICS}
            on_event(Checkpoint(step=step, path=str(folder.resolve()), metrics=shown))
    return Progress(total, tokens, before + time.monotonic() - started)


def schedule(kind: str, step: int, *, total: int, warmup: int) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then cosine or linear to zero, or flat."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if kind == "linear" else 1.0


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Dataset, *, size: int, pad: int, on_event: Callable[[Event], None]
) -> dict[str, float]:
    """Loss and accuracy over the whole validation file, under both names the hosted service uses."""
    device = next(model.parameters()).device
    pieces = batches(data.samples, size)
    on_event(Stage(stage="evaluating", message=f"Evaluating {len(data.samples)} validation rows"))
    loss, tokens, correct = 0.0, 0, 0
    for done, piece in enumerate(pieces, start=1):
        batch = collate(piece, pad=pad).to(device)
        part = tally(model, batch)
        loss, tokens, correct = loss + float(part.loss), tokens + part.tokens, correct + part.correct
        on_event(Tick(done=done, total=len(pieces)))
    found = {"loss": loss / tokens if math.isfinite(loss) else None, "mean_token_accuracy": correct / tokens}
    return {f"{prefix}_{k}": v for k, v in found.items() if v is not None for prefix in ("valid", "full_valid")}


def _train_mode(layers: dict[str, LoRALinear], *, on: bool) -> None:
    """Only the adapter's own dropout is ever active: the base stays as it is evaluated."""
    for layer in layers.values():
        layer.dropout.train(on)
