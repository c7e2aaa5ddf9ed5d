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
    """What comes after a run's last step, in two halves: `observe`, which needs the trained model, and `conclude`.

    Neither raises what goes wrong: that is the run's end. A `Stopped` is raised.
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
        """Write the adapter and note what it does to the model, once; nothing of the run holds on to the base then."""
        if self._steps is not None and not self._observed:
            self._observed = True
            self._advance(lambda steps: next(steps))

    def conclude(self, *, beside: bool) -> End | None:
        """Verify on a fresh base; None: it is put off, because there is no room for it.

        Args:
            beside: others train on the first base, which stays where it is.
        """
        if self._steps is not None:
            self._advance(lambda steps: steps.send(beside))
        return self._end

    def close(self) -> None:
        """Give up, and remove what was written of the adapter."""
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
    """Export and check what has been trained; each yield asks whether the fresh base is to lie beside the first one."""
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
        resources=outputs.resources(run),
    )
    emit(done)
    return done


def _verify(run: Run, folder: Path, seen: outputs.Observed, *, beside: bool) -> dict[str, Any] | None:
    """What the check found; None where there is no room for it beside the base that others train on."""
    if beside and not run.base.has_room_beside(tokens=seen.longest, factors=run.plan.trainable_parameters):
        _emit_put_off(run)
        return None
    try:
        return outputs.verify(run, folder, seen, beside=beside)
    except Exception as error:
        if not (beside and is_out_of_memory(error)):  # it was measured, but others may use the device too
            raise
        run_errors.release_frames(error)
    _emit_put_off(run)
    return None


def _emit_put_off(run: Run) -> None:
    text = (
        "The training is finished and in a checkpoint. The adapter is verified when those that it is trained together"
        " with are done: there is no room for a second copy of the base beside theirs"
    )
    run.emit(Message(message=text, data={"kind": "export", "put_off": True}))


def _rates(training: Hyperparameters) -> dict[str, float]:
    """The peak rate of a resolved recipe, and the one that a multiplier of 1 stands for."""
    assert training.learning_rate is not None and training.learning_rate_multiplier != "auto"
    return {"rate": training.learning_rate, "usual": training.learning_rate / training.learning_rate_multiplier}


def _follow_rank0(run: Run, progress: Progress) -> Steps:
    """The end of a process that is not rank 0, which writes the adapter and needs this process to check it."""
    folder = run.out / "adapter"
    seen = outputs.observe_adapter(run) if run.base.sharded else None
    beside = yield
    if seen is not None:
        outputs.verify(run, outputs.unverified_folder(folder), seen, beside=beside)
    return Done(adapter=str(folder), trained_tokens=progress.tokens, export_check={}, resources={})
