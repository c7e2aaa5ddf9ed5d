"""The training state of one adapter: its rows, learning rate, optimizer, log, evaluations and checkpoints.

A metric is written to the log before the checkpoint that contains it. The loss of a step does not depend on how its
batch is cut into micro-batches, on how many processes share them, or on other adapters in the same pass.
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

from lorainit.config.errors import HaltReached, NonFiniteLoss, UpdateOutOfMemory
from lorainit.config.events import Checkpoint, Halted, Metrics, Stage, Tick
from lorainit.config.resolve import steps_per_epoch, total_steps
from lorainit.context import Run
from lorainit.data.batches import split_into_batches
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
    """Trains the adapter of one run: it counts the steps and has what a step needs.

    The parameters, the rows and the size of passes are the run's. If memory runs out, it makes the run's passes
    smaller. It writes `metrics.jsonl` and `checkpoints/step-NNNNNN` in the run's folder.

    Args:
        write_adapter: writes the adapter of a run in PEFT's format into a folder.
        resumed: the checkpoint that it resumes from, if it does.
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
        self._halt_at = find_halt(run.spec.stop_after, total=self.total, warmup=self.warmup)
        # Batches at the beginning of the run's order of rows that are skipped, because the initialization used them.
        self.skip = run.lora.method.batches_used(run.report.summary)
        self.parameters = run.parameters
        self.optimizer = make_optimizer(recipe, run.layers)
        self.log = run.out / "metrics.jsonl"
        self._write_adapter, self._is_resumed = partial(write_adapter, run), resumed is not None
        self.step, self.tokens, self._before = 0, 0, 0.0
        # `_taken`: steps that the optimizer has made; `_saved`: those in the last checkpoint. `step` is one ahead of
        # `_taken` while a step is being computed. `_unlogged` holds the numbers of the last step until its evaluation
        # is done, because both are logged in one line.
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
        """The steps that the optimizer has made. A step that is being computed does not count."""
        seconds = self._before + time.monotonic() - self._started
        return Progress(self._taken, self.tokens, seconds, self._unlogged)

    @property
    def is_over(self) -> bool:
        """Whether the last step has been taken."""
        return self.step >= self.total

    def begin(self, evaluate: Evaluate) -> None:
        """Evaluate the untrained adapter.

        A resumed run has done that already. If its last step was not logged, its evaluation, log line and checkpoint
        are made now.
        """
        if self.run.valid and not self._is_resumed:
            self._log(self._metrics(**evaluate(self.run.valid.samples)))
        text = f"Training: {self.total} steps, {self.per_epoch} per epoch"
        self.run.emit(Stage(stage="training", message=text))
        if self._unlogged:
            self._conclude_step(evaluate)

    def draw(self) -> list[list[Sample]]:
        """Take the rows of the next step, and return this process's micro-batches of them."""
        self.step += 1
        epoch, position = divmod(self.skip + self.step - 1, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self.run.order_rows(epoch)
        start = position * self.batch_size
        samples = [self.run.data.samples[i] for i in self._epoch[1][start : start + self.batch_size]]
        self.wanted = sum(map(self.run.objective.count, samples))  # the count of the whole effective batch
        self._seen = sum(len(s.ids) for s in samples)
        self._begun = time.monotonic()
        self._parts: list[Sums] = []
        pieces = split_into_batches(samples, self.run.training_budget, self.run.regime)
        self.pieces, self.idle_passes = pieces[self.world.share], self.world.count_idle_passes(len(pieces))
        return self.pieces

    def add(self, piece: int, sums: Sums) -> None:
        """Keep the sums of one micro-batch."""
        self._parts.append(sums)
        per_step = len(self.pieces)
        done = (self.step - 1) * per_step + piece + 1
        self.run.emit(Tick(done=min(done, self.total * per_step), total=self.total * per_step))

    def drop_by(self, piece: int | None) -> None:
        """Set the dropout masks of this micro-batch, or switch dropout off (None). The base has no active dropout."""
        # The mask depends on the position in the step and not on the process that computes it, so that a run gives the
        # same numbers on another number of processes. The 0 used to be a rank. It stays, because otherwise a run that
        # began with an older version would get other masks when it resumes.
        position = None if piece is None else piece * self.world.size + self.world.rank
        for name, layer in self.run.layers.items():
            if layer.dropout.p:
                where = f"{self.run.spec.seed}\0{self.step}\0{0}\0{position}\0{name}"
                layer.dropout.key = None if piece is None else where

    def is_poisoned(self) -> bool:
        """Whether the loss of this step is not finite because the adapter's own factors are not."""
        finite = sum(part.loss for part in self._parts).isfinite()  # type: ignore[union-attr]
        return not finite and not all(p.isfinite().all() for p in self.parameters)

    def give_up(self, _evaluate: Evaluate) -> None:
        """Raise `NonFiniteLoss`. It takes an argument only so that it can be called like `finish_step`."""
        raise _not_finite(f"Step {self.step}: factors of the adapter are not finite.")

    def repeat_step(self, _evaluate: Evaluate | None = None) -> None:
        """Drop the gradients of this step, so that the next `draw` takes the same rows again."""
        self.optimizer.zero_grad()
        self.step -= 1

    def repeat_smaller(self) -> bool:
        """Drop the gradients of this step, and halve the passes from here on. Returns whether they could be halved.

        The largest pass that all rows can make is halved and not the pass of this step, because this step may have
        only a few short rows, and half of them would slow down the rest of the run.
        """
        self.repeat_step()
        return self.run.halve_passes(self.run.largest_pass())

    def evaluate_smaller(self) -> bool:
        """Halve the passes over validation rows from here on. Returns whether they could be halved."""
        return self.run.halve_evaluations(self.run.largest_evaluation())

    def finish_step(self, evaluate: Evaluate, *, pass_again: Callable[[], None]) -> None:
        """Clip the gradients, update the adapter, and log. Evaluate and write a checkpoint if they are due.

        Args:
            pass_again: draws this step again and computes its gradients.

        Raises:
            NonFiniteLoss: the loss or the gradient norm is NaN or infinite.
            UpdateOutOfMemory: the update ran out of memory. It cannot be repeated, because some factors may have
                been updated already.
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
        """Evaluate if it is due, log the step, and write a checkpoint if it is due.

        The log comes before the checkpoint, since the checkpoint contains a copy of it.

        Raises:
            HaltReached: this was the step at which the run is to stop.
        """
        recipe, valid = self.run.training, self.run.valid
        found = evaluate(valid.samples) if valid and self._is_due(recipe.eval_interval) else {}
        if found and not self.is_over:
            self.run.emit(Stage(stage="training", message="Training continues"))
        metrics = self._metrics(**self._unlogged, **found)
        self._unlogged = {}
        self._log(metrics)
        if self.world.is_rank0 and self._is_due(recipe.checkpoint_interval):
            self._write_checkpoint(metrics)
        if self.step == self._halt_at:
            self.run.emit(Halted(step=self.step))
            raise HaltReached(f"The run halts after step {self.step}, as it was asked to.")

    def save(self) -> None:
        """Write a checkpoint of the steps that were made, unless the last one has all of them.

        A step that is being computed is not in it, so a resumed run computes it again.
        """
        if self.world.is_rank0 and self._taken > self._saved:
            self.step = self._taken
            metrics = self._last if self._last and not self._unlogged else self._metrics(**self._unlogged)
            self._write_checkpoint(metrics)

    def _update(self) -> None:
        try:
            self.optimizer.step()
        except Exception as error:
            if is_out_of_memory(error):
                # A class of its own, because the worker then tries the job again from its last checkpoint.
                raise UpdateOutOfMemory(self.step) from error
            raise

    def _sums_that_fit(self, pass_again: Callable[[], None]) -> tuple[float, dict[str, float], float]:
        """`_sums`. If memory runs out in it, the whole step is repeated once, because gradients may be clipped partly.

        Several processes do not repeat it: the others would still wait in the same all-reduce.
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
            if parameter.grad is None:  # this process had no micro-batch, but all have to take part in the all-reduce
                parameter.grad = torch.zeros_like(parameter)
        total = reduce(add_sums, self._parts, zero_sums(self.run.objective, self.parameters[0].device))
        loss, metrics = total.loss / self.wanted, total.metrics
        self.world.all_reduce([loss, *metrics.values(), *(p.grad for p in self.parameters if p.grad is not None)])
        norm = clip(self.run)
        # All numbers in one copy, because each copy to the host waits for the GPU. float64 holds all of them exactly.
        first, *values, last = torch.stack([loss, *(value.double() for value in metrics.values()), norm]).tolist()
        return first, dict(zip(metrics, values, strict=True)), last

    def _is_due(self, interval: int | str) -> bool:
        assert isinstance(interval, int)
        return self.is_over or self.step % interval == 0 or self.step == self._halt_at

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
    """Clip the gradients of the run's adapter to `max_grad_norm` (None = no limit). Returns their norm before."""
    return torch.nn.utils.clip_grad_norm_(run.parameters, run.training.max_grad_norm or math.inf)


def find_halt(share: float | None, *, total: int, warmup: int) -> int | None:
    """The step after which a run halts that is to stop after this share of its steps; None if it goes to its end.

    It is behind the warm-up, because losses in it say little about the rate that is reached at its end.
    """
    if share is None:
        return None
    step = max(math.ceil(share * total), warmup + 1)
    return step if step < total else None


def _not_finite(what: str) -> NonFiniteLoss:
    where = "training.learning_rate"
    return NonFiniteLoss(f"{what} A lower learning rate usually helps.", param=where)


def schedule(kind: str, step: int, *, total: int, warmup: int) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then cosine or linear decay to zero, or constant.

    Warm-up begins at 1/warmup and not at 0, because a step with rate 0 would train nothing.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if kind == "linear" else 1.0
