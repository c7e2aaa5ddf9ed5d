"""Finishes a run: its adapter is written while the trained model is in memory, and then verified on a fresh base.

Verifying needs memory for a second base. If other runs still train on the first one and the device cannot hold both,
it waits until they are done and the first base is freed (docs/decisions/0050). An error here ends this run alone.
"""

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from lorainit.config.errors import LorainitError
from lorainit.config.events import Done, Message, Stage
from lorainit.config.spec import Hyperparameters
from lorainit.context import Run
from lorainit.export import outputs
from lorainit.export.outcome import find_effect_warnings, find_warnings
from lorainit.runtime.devices import is_out_of_memory
from lorainit.runtime.distributed import run_errors
from lorainit.train.checkpoint import Progress

End = Done | LorainitError
Steps = Generator[None, bool, Done]


class RunFinisher:
    """The work after a run's last step, in two parts: `observe`, which needs the trained model, and `conclude`.

    An error in them is not raised but becomes this run's end, so that the other runs of the group go on. Only `Stopped`
    and failures of the whole process are raised.
    """

    def __init__(self, run: Run, end: Progress | LorainitError) -> None:
        self._run, self._observed = run, False
        self._end: End | None = None
        self._steps: Steps | None = None
        if isinstance(end, LorainitError):
            self._end_with(end)
        else:
            self._steps = _export(run, end) if run.is_rank0 else _follow_rank0(run, end)

    def observe(self) -> None:
        """Write the adapter and measure what it does to the model, once. Afterwards the run holds no reference to the
        base, so that its memory can be freed."""
        if self._steps is not None and not self._observed:
            self._observed = True
            self._advance(lambda steps: next(steps))

    def conclude(self, *, beside: bool) -> End | None:
        """Verify on a fresh base and return how the run ended; None if there is no memory for it now, so call it again.

        Args:
            beside: other runs still train on the first base, so it stays in memory.
        """
        if self._steps is not None:
            self._advance(lambda steps: steps.send(beside))
        return self._end

    def close(self) -> None:
        """Give up, and delete the files of the adapter that were written."""
        if self._steps is not None:
            self._steps.close()

    def _advance(self, further: Callable[[Any], None]) -> None:
        try:
            further(self._steps)
        except StopIteration as over:
            self._end_with(over.value)
        except Exception as error:
            self._end_with(run_errors.to_run_error(error, alone=self._run.alone))

    def _end_with(self, end: End) -> None:
        self._end, self._steps = end, None
        self._run.release_layers()


def _export(run: Run, progress: Progress) -> Steps:
    """Export and check the trained adapter. Each `yield` asks whether the first base stays in memory (`beside`)."""
    out, emit = run.out, run.emit
    outputs.write_metrics(out)
    emit(Stage(stage="exporting", message="Writing the adapter in PEFT's format"))
    with outputs.write_atomically(out / "adapter") as folder:
        outputs.write_adapter(run, folder)
        seen, check = outputs.observe_adapter(run), None
        while check is None:
            check = _verify(run, folder, seen, beside=(yield))
        base = run.report.summary.get("base_valid_loss")
        warnings = find_warnings(out / "metrics.jsonl", **_rates(run.training), base=base) + find_effect_warnings(check)
        outputs.write_manifest(run, folder, export_check=check, warnings=warnings)
    for found in warnings:
        emit(Message(level="warn", message=found.message, data={"kind": found.code, **found.data}))
    done = Done(
        adapter=str((out / "adapter").resolve()),
        trained_tokens=progress.tokens,
        warnings=warnings,
        export_check=check,
        resources=outputs.measure_resources(run),
    )
    emit(done)
    return done


def _verify(run: Run, folder: Path, seen: outputs.Observed, *, beside: bool) -> dict[str, Any] | None:
    """The result of the check; None if there is no memory for it beside the base that other runs train on."""
    if beside and not run.base.has_room_beside(tokens=seen.longest, factors=run.plan.trainable_parameters):
        _emit_put_off(run)
        return None
    try:
        return outputs.verify(run, folder, seen, beside=beside)
    except Exception as error:
        # Enough was free when it was measured, but other processes use the device too.
        if not (beside and is_out_of_memory(error)):
            raise
        run_errors.release_frames(error)
    _emit_put_off(run)
    return None


def _emit_put_off(run: Run) -> None:
    text = (
        "The training is finished and saved in a checkpoint. The adapter will be verified when the other runs of its"
        " group are finished, because there is no memory for a second copy of the base until then"
    )
    run.emit(Message(message=text, data={"kind": "export", "put_off": True}))


def _rates(training: Hyperparameters) -> dict[str, float]:
    """The peak rate of the resolved hyperparameters, and the rate that a multiplier of 1 stands for."""
    assert training.learning_rate is not None and training.learning_rate_multiplier != "auto"
    return {"rate": training.learning_rate, "usual": training.learning_rate / training.learning_rate_multiplier}


def _follow_rank0(run: Run, progress: Progress) -> Steps:
    """The end of a process other than rank 0. Rank 0 writes the adapter; if the base is sharded, it needs the other
    processes for the check."""
    folder = run.out / "adapter"
    seen = outputs.observe_adapter(run) if run.base.sharded else None
    beside = yield
    if seen is not None:
        outputs.verify(run, outputs.unverified_folder(folder), seen, beside=beside)
    return Done(adapter=str(folder), trained_tokens=progress.tokens, export_check={}, resources={})
