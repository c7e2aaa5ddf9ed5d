"""Runs one spec, or several on one base, from beginning to end: load, initialize, train, export, verify.

`run` is the entry point of the library. It reports through `on_event` only, and writes its results to `out`:
`adapter/`, `checkpoints/`, `metrics.jsonl`, `step_metrics.csv`, `spec.json` (resolved).
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from lorainit.config.errors import Stopped
from lorainit.config.events import Done, InitReport, OnEvent, Stage
from lorainit.config.spec import RunSpec
from lorainit.context import Report, Run, RunRequest
from lorainit.data.dataset import require_readable
from lorainit.export import early_check, outputs
from lorainit.export.finish import End, RunFinisher
from lorainit.init import stage
from lorainit.model.base import Base, open_base
from lorainit.prepare import prepare
from lorainit.runtime import devices
from lorainit.runtime.distributed import run_errors
from lorainit.runtime.distributed.world import World, join_world
from lorainit.train import checkpoint
from lorainit.train.checkpoint import Restored
from lorainit.train.loop import train
from lorainit.train.memory import fit_to_memory


def run(spec: RunSpec, out: Path, on_event: OnEvent) -> Done:
    """Run a spec from beginning to end.

    Args:
        out: a folder for this run alone; made if absent.
        on_event: called with every event, at least once per initialized layer and per batch, so that a caller can stop
            the run soon. An exception that it raises ends the run.

    Returns:
        The last event. `on_event` has been called with it too.

    Raises:
        LorainitError: one of its subclasses, for everything a caller could have caused or can fix.
    """
    for _, end in run_together([RunRequest(spec, Path(out), on_event)]):
        if isinstance(end, Done):
            return end
        raise end
    raise AssertionError("a run has an end")


def run_together(requests: Sequence[RunRequest]) -> Iterator[tuple[int, End]]:
    """Run several specs on one base in shared forward passes. Yield (index, end) of each run as soon as it ends.

    Each run gives the adapter that it would give alone. An error in one run's own work (its data, initialization,
    evaluation, export) ends only that run, and is yielded as its end. These end all runs that are left, and are
    raised: an error in a shared pass, a `Stopped`, and an exception of an `on_event` that is not a `LorainitError`.
    The reason is docs/decisions/0050.

    Raises:
        LorainitError: as for `run`.
    """
    first = requests[0].spec
    requests = [replace(request, on_event=run_errors.wrap_listener(request.on_event)) for request in requests]
    with (
        run_errors.translate_errors(),
        run_errors.raise_listener_errors(),
        devices.make_reproducible(first.seed, deterministic=first.deterministic),
        join_world(devices.pick_device()) as world,
        closing(_run_group(requests, world)) as ends,
    ):
        yield from ends


def _run_group(requests: Sequence[RunRequest], world: World) -> Generator[tuple[int, End], None, None]:
    base, runs, resumed = None, dict[int, Run](), list[Restored | None]()
    for who, request in enumerate(requests):
        try:
            request.out.mkdir(parents=True, exist_ok=True)
            request.on_event(Stage(stage="loading", message=f"Loading {request.spec.model.id}"))
            require_readable(request.spec.data)
            base = base or open_base(request.spec, request.out, request.on_event, world=world)
            world = base.world
            runs[who], restored = _begin(request, base, sharing=len(requests))
            resumed.append(restored)
            del restored  # otherwise its tensors would stay in memory after `train` has let go of them
        except Exception as error:
            yield who, run_errors.to_run_error(error, alone=len(requests) == 1)
    if base is None or not runs:
        return
    names, training, waiting = list(runs), set(runs), dict[int, RunFinisher]()
    together = list(runs.values())
    fit_to_memory(together)
    with closing(train(together, resumed, write_adapter=outputs.write_adapter)) as trained, _close_all(waiting):
        for ended in trained:
            endings = {names[index]: RunFinisher(runs[names[index]], end) for index, end in ended}
            waiting |= endings
            training -= endings.keys()
            if not training:
                break
            for who, ending in endings.items():
                try:
                    ending.observe()
                    end = ending.conclude(beside=True)
                except Stopped as stop:
                    # Thrown into `train`, so that the runs that still train write a checkpoint of their steps.
                    trained.throw(stop)
                    raise
                if end is not None:
                    del waiting[who]
                    yield who, end
        trained.close()  # its frames refer to the base, which would otherwise stay in memory after `release`
        # Every run needs the trained model for `observe`, so all of them come before the base is released. Only then
        # is there room for a second, untouched base, which `conclude` needs.
        for ending in waiting.values():
            ending.observe()
        base.release()
        for who, ending in waiting.items():
            end = ending.conclude(beside=False)
            assert end is not None
            yield who, end


@contextmanager
def _close_all(waiting: dict[int, RunFinisher]) -> Iterator[None]:
    try:
        yield
    finally:
        for ending in waiting.values():
            ending.close()


def _begin(request: RunRequest, base: Base, *, sharing: int) -> tuple[Run, Restored | None]:
    """Load the run's data, and initialize its adapter or restore it from a checkpoint."""
    point = request.spec.resume_from
    known = checkpoint.read_manifest(Path(point)) if point else {}
    run = prepare(request, base, sharing=sharing, known=known.get("passes"))
    if run.is_rank0:
        outputs.write_spec(run)
    restored = checkpoint.read(Path(point), recipe=run.recipe) if point else None
    run.emit(run.plan)
    run.emit(Stage(stage="initializing", message=f"Initializing with {run.lora.method.method}"))
    # Before the slow parts, so that a run whose adapter stock PEFT could not read fails early.
    run.early_check = early_check.check_export_early(run, known=known.get("proof"))
    if restored:
        _resume(run, restored)
    else:
        stage.start(run)
    # Every process has computed the start, but rounding may differ between devices, so all take that of rank 0.
    base.world.broadcast(
        [t for layer in run.layers.values() for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))]
    )
    run.emit(InitReport(report=run.report.summary))
    return run, restored


def _resume(run: Run, restored: Restored) -> None:
    """Restore the layers, and the report of the initialization that the checkpoint's run made."""
    run.layers = checkpoint.restore_layers(run.targets, run.lora, restored)
    run.report = Report(restored.report, restored.modules)
