"""One adapter's way through training: its rows, rate, optimizer, log, evaluations and checkpoints.

What it logs is on disk before a checkpoint that contains it; what it minimizes does not depend on how
a batch is cut into pieces, on how many processes share them, or on the adapters that train beside it.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from lorainit.config.errors import NonFiniteLoss, UpdateOutOfMemory
from lorainit.config.events import Checkpoint, Metrics, Stage, Tick
from lorainit.config.resolve import steps_per_epoch, total_steps
from lorainit.context import Run
from lorainit.data.batches import batches
from lorainit.data.dataset import Sample
from lorainit.model.forward.loss import Sums, add_sums, zero_sums
from lorainit.runtime.devices import is_out_of_memory
from lorainit.runtime.retry import retry_until_it_fits
from lorainit.train.checkpoint import Progress, Restored, write
from lorainit.train.optimizers import make_optimizer, set_rate

_CHECKPOINT_METRICS = (
    "step",
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)
Evaluate = Callable[[Sequence[Sample]], dict[str, float]]


class AdapterTrainer:
    """Trains the adapter of one run: which step it is at and everything that step needs.

    It reads from the run what is trained, on which rows and in passes of which size, and tells the run what memory
    makes of these. The folder of the run gets `metrics.jsonl` and `checkpoints/step-NNNNNN`.

    Args:
        write_adapter: writes the adapter of a run in PEFT's format into a folder.
        resumed: the checkpoint that it goes on from.
    """

    def __init__(
        self, run: Run, *, write_adapter: Callable[[Run, Path], None], resumed: Restored | None = None
    ) -> None:
        recipe = run.training
        assert recipe.batch_size != "auto" and recipe.learning_rate is not None
        self.run, self.world = run, run.base.world
        self.batch_size, self.rate = recipe.batch_size, recipe.learning_rate
        rows = len(run.data.samples)
        self.total = total_steps(recipe, rows=rows)
        self.per_epoch = steps_per_epoch(rows, recipe.batch_size)
        self.warmup = math.ceil(recipe.warmup_ratio * self.total)
        # Batches of the run's order of rows that are passed over, since the initialization has used them.
        self.skip = run.lora.method.batches_used(run.report.summary)
        self.parameters = run.parameters
        self.optimizer = make_optimizer(recipe, run.layers)
        self.log = run.out / "metrics.jsonl"
        self._write_adapter, self._is_resumed = partial(write_adapter, run), resumed is not None
        self.step, self.tokens, self._before = 0, 0, 0.0
        # Steps that the optimizer has taken, and how many of them a checkpoint has: `step` runs ahead while one is
        # on its way. What the last step found waits in `_unlogged` until the evaluation that belongs to it is done.
        self._taken = self._saved = 0
        self._unlogged: dict[str, float] = {}
        self._last: Metrics | None = None
        self._epoch: tuple[int, Sequence[int]] = (-1, [])
        if resumed:
            self._go_on(resumed)
        elif self.world.is_rank0:
            self.log.write_bytes(b"")
        self._started = time.monotonic()

    def _go_on(self, resumed: Restored) -> None:
        resumed.restore(self.run.layers, self.optimizer)
        done = resumed.progress
        self.step, self.tokens, self._before = done.step, done.tokens, done.seconds
        self._taken = self._saved = done.step
        self._unlogged = done.unlogged
        if self.world.is_rank0:
            self.log.write_bytes((resumed.folder / self.log.name).read_bytes())

    @property
    def progress(self) -> Progress:
        """How far it is: the steps taken, whatever is on its way."""
        seconds = self._before + time.monotonic() - self._started
        return Progress(self._taken, self.tokens, seconds, self._unlogged)

    @property
    def is_over(self) -> bool:
        """Whether the last step has been taken."""
        return self.step >= self.total

    def begin(self, evaluate: Evaluate) -> None:
        """Evaluate the start, unless it was evaluated before an interruption."""
        if self.run.valid and not self._is_resumed:
            self._log(self._metrics(**evaluate(self.run.valid.samples)))
        text = f"Training: {self.total} steps, {self.per_epoch} per epoch"
        self.run.emit(Stage(stage="training", message=text))
        if self._unlogged:
            self._conclude_step(evaluate)

    def draw(self) -> list[list[Sample]]:
        """This process's micro-batches of the next step."""
        self.step += 1
        epoch, position = divmod(self.skip + self.step - 1, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self.run.order(epoch)
        start = position * self.batch_size
        samples = [self.run.data.samples[i] for i in self._epoch[1][start : start + self.batch_size]]
        self.wanted = sum(map(self.run.objective.count, samples))  # the count of the whole effective batch
        self._seen = sum(len(s.ids) for s in samples)
        self._begun = time.monotonic()
        self._parts: list[Sums] = []
        pieces = batches(samples, self.run.training_budget, self.run.regime)
        self.pieces, self.count_idle_passes = pieces[self.world.share], self.world.count_idle_passes(len(pieces))
        return self.pieces

    def add(self, piece: int, sums: Sums) -> None:
        """Take one micro-batch's sums."""
        self._parts.append(sums)
        per_step = len(self.pieces)
        done = (self.step - 1) * per_step + piece + 1
        self.run.emit(Tick(done=min(done, self.total * per_step), total=self.total * per_step))

    def drop_by(self, piece: int | None) -> None:
        """Set the dropout of this micro-batch; None is none. Only the adapter's own dropout is ever active."""
        # Its place in the step, whoever computes it. The 0 was a process's number once: what has begun goes on alike.
        place = None if piece is None else piece * self.world.size + self.world.rank
        for name, layer in self.run.layers.items():
            if layer.dropout.p:
                where = f"{self.run.spec.seed}\0{self.step}\0{0}\0{place}\0{name}"
                layer.dropout.key = None if piece is None else where

    def is_poisoned(self) -> bool:
        """Whether this step's loss is not finite because the adapter's own factors are not."""
        finite = sum(part.loss for part in self._parts).isfinite()  # type: ignore[union-attr]
        return not finite and not all(p.isfinite().all() for p in self.parameters)

    def give_up(self, _evaluate: Evaluate) -> None:
        """Raise `NonFiniteLoss`."""
        raise _not_finite(f"Step {self.step}: factors of the adapter are not finite.")

    def repeat_step(self, _evaluate: Evaluate | None = None) -> None:
        """Forget this step's gradients; it is drawn again."""
        self.optimizer.zero_grad()
        self.step -= 1

    def repeat_smaller(self) -> bool:
        """Forget this step's gradients; it is drawn again, and from here on passes are smaller if they can be.

        By what the rows can make and not by this step's, which may be a few short ones beside those of others.
        """
        self.repeat_step()
        largest = self.run.largest_pass()
        if len(largest) > 1:
            self.run.halve_passes(largest)
        return len(largest) > 1

    def evaluate_smaller(self) -> bool:
        """From here on passes over validation rows are smaller, if they can be."""
        largest = self.run.largest_evaluation()
        if len(largest) > 1:
            self.run.halve_evaluations(largest)
        return len(largest) > 1

    def finish_step(self, evaluate: Evaluate, *, pass_again: Callable[[], None]) -> None:
        """Clip, update, log, and where due evaluate and write a checkpoint.

        Args:
            pass_again: draws this step and makes its gradients anew.

        Raises:
            NonFiniteLoss: the loss or the gradient norm is NaN or infinite.
            UpdateOutOfMemory: the update ran out of memory, and part of the factors may have moved.
        """
        recipe = self.run.training
        loss, metrics, norm = self._sums_that_fit(pass_again)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _not_finite(f"Step {self.step}: loss {loss}, gradient norm {norm}.")
        rate = self.rate * schedule(recipe.lr_scheduler, self.step - 1, total=self.total, warmup=self.warmup)
        set_rate(self.optimizer, rate)
        self._update()
        self.optimizer.zero_grad()
        self.tokens += self._seen
        self._taken = self.step
        self._unlogged = {
            "train_loss": loss,
            **{f"train_{name}": value / self.wanted for name, value in metrics.items()},
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_per_second": self.wanted / (time.monotonic() - self._begun),
        }
        self._conclude_step(evaluate)

    def _conclude_step(self, evaluate: Evaluate) -> None:
        """Evaluate where due, log what the step found, and write a checkpoint where due."""
        recipe, valid = self.run.training, self.run.valid
        found = evaluate(valid.samples) if valid and self._is_due(recipe.eval_interval) else {}
        if found and not self.is_over:
            self.run.emit(Stage(stage="training", message="Training goes on"))
        metrics = self._metrics(**self._unlogged, **found)
        self._unlogged = {}
        self._log(metrics)
        if self.world.is_rank0 and self._is_due(recipe.checkpoint_interval):
            self._write_checkpoint(metrics)

    def save(self) -> None:
        """A checkpoint of the steps taken so far, unless one has them all; a step on its way is not in it."""
        if self.world.is_rank0 and self._taken > self._saved:
            self.step = self._taken
            said = self._last if self._last and not self._unlogged else self._metrics(**self._unlogged)
            self._write_checkpoint(said)

    def _update(self) -> None:
        try:
            self.optimizer.step()
        except Exception as error:
            if is_out_of_memory(error):
                raise UpdateOutOfMemory(self.step) from error
            raise

    def _sums_that_fit(self, pass_again: Callable[[], None]) -> tuple[float, dict[str, float], float]:
        """`_sums`; where memory runs out in them the step is done again, once: its gradients may be half clipped.

        Of several processes the others would be in the middle of the same sum.
        """
        attempts = itertools.count()

        def attempt() -> tuple[float, dict[str, float], float]:
            if next(attempts):
                self.run.report_shortage("Memory ran out while gradients were summed: the step is done again")
                self.repeat_step()
                pass_again()
            return self._sums()

        return retry_until_it_fits(attempt) if self.world.size == 1 else self._sums()

    def _sums(self) -> tuple[float, dict[str, float], float]:
        """Loss, sums of metrics and gradient norm of the step over all pieces and processes, gradients clipped."""
        for parameter in self.parameters:
            if parameter.grad is None:  # another process had all the pieces
                parameter.grad = torch.zeros_like(parameter)
        total = reduce(add_sums, self._parts, zero_sums(self.run.objective, self.parameters[0].device))
        loss, metrics = total.loss / self.wanted, total.metrics
        self.world.all_reduce([loss, *metrics.values(), *(p.grad for p in self.parameters if p.grad is not None)])
        norm = clip(self.run)
        # Together, since a GPU is waited for each time; float64 has all of them exactly.
        first, *values, last = torch.stack([loss, *(value.double() for value in metrics.values()), norm]).tolist()
        return first, dict(zip(metrics, values, strict=True)), last

    def _is_due(self, interval: int | str) -> bool:
        assert isinstance(interval, int)
        return self.is_over or self.step % interval == 0

    def _metrics(self, **found: float) -> Metrics:
        return Metrics(
            step=self.step,
            total_steps=self.total,
            epoch=self.step / self.per_epoch,
            tokens=self.tokens,
            seconds=self.progress.seconds,
            **found,
        )

    def _log(self, metrics: Metrics) -> None:
        if self.world.is_rank0:
            with self.log.open("a") as stream:
                stream.write(json.dumps(metrics.model_dump(exclude={"kind", "member"})) + "\n")
        self._last = metrics
        self.run.emit(metrics)

    def _write_checkpoint(self, metrics: Metrics) -> None:
        folder = self.run.out / "checkpoints" / f"step-{self.step:06d}"
        written = partial(
            write,
            folder,
            self.run.layers,
            self.optimizer,
            progress=self.progress,
            recipe=self.run.recipe,
            metrics=self.log,
            write_adapter=self._write_adapter,
        )
        retry_until_it_fits(written)
        self._saved = self.step
        shown = {name: getattr(metrics, name) for name in _CHECKPOINT_METRICS}
        self.run.emit(Checkpoint(step=self.step, path=str(folder.resolve()), metrics=shown))


def clip(run: Run) -> Tensor:
    """Scale the gradients of its adapter down to the recipe's norm; returns the norm that they had."""
    return torch.nn.utils.clip_grad_norm_(run.parameters, run.training.max_grad_norm or math.inf)


def _not_finite(what: str) -> NonFiniteLoss:
    where = "training.learning_rate"
    return NonFiniteLoss(f"{what} A lower learning rate usually helps.", param=where)


def schedule(kind: str, step: int, *, total: int, warmup: int) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then cosine or linear to zero, or flat."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if kind == "linear" else 1.0
