"""The recipe: load, initialize, train, export, verify. From a spec to an adapter, or from several to as many.

`run` is the library's front door. It talks through `on_event` only, and leaves in `out` what it
made: `adapter/`, `checkpoints/`, `metrics.jsonl`, `step_metrics.csv`, `spec.json` (resolved).
"""

import json
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lorainit.config.errors import Stopped
from lorainit.config.events import Done, InitReport, Stage
from lorainit.config.spec import RunSpec
from lorainit.data.dataset import require_readable
from lorainit.export import delivery, proof
from lorainit.export.ending import End, Ending, Run
from lorainit.init import stage
from lorainit.init.initialize import Report
from lorainit.model.base import Base, OnEvent, open_base
from lorainit.prepare import Job, prepare
from lorainit.runtime import hardware
from lorainit.runtime.distributed import isolation
from lorainit.runtime.distributed.world import World, joined
from lorainit.train import checkpoint
from lorainit.train.checkpoint import Restored
from lorainit.train.fit import fit
from lorainit.train.loop import train
from lorainit.train.member import Member


@dataclass(frozen=True)
class Request:
    """One run of a group: its spec, a folder of its own (made if absent), and who is told."""

    spec: RunSpec
    out: Path
    on_event: OnEvent


def run(spec: RunSpec, out: Path, on_event: OnEvent) -> Done:
    """Run a spec from beginning to end.

    Args:
        out: a folder of this run's own; made if absent.
        on_event: called with every event; what it raises stops the run. Called at least once per
            layer initialized and per batch.

    Returns:
        The last event, which `on_event` has seen too.

    Raises:
        LorainitError: one of its subclasses, for everything a caller could have caused or can fix.
    """
    for _, end in run_together([Request(spec, Path(out), on_event)]):
        if isinstance(end, Done):
            return end
        raise end
    raise AssertionError("a run has an end")


def run_together(requests: Sequence[Request]) -> Iterator[tuple[int, End]]:
    """Run several specs on one base in one forward pass; yield each one's index and end as soon as it is there.

    Each gives the adapter that it would give alone. What goes wrong in one run's own work ends that run and is
    yielded, whatever it is; what goes wrong in the passes that all share, a `Stopped`, and what an `on_event` raises
    beside our own errors end all that have not ended and are raised.

    Raises:
        LorainitError: as for `run`.
    """
    first = requests[0].spec
    requests = [replace(request, on_event=isolation.listener(request.on_event)) for request in requests]
    with (
        isolation.as_our_errors(),
        isolation.raise_listener_errors(),
        hardware.reproducible(first.seed, deterministic=first.deterministic),
        joined(hardware.pick_device()) as world,
        closing(_together(requests, world)) as ends,
    ):
        yield from ends


def _together(requests: Sequence[Request], world: World) -> Generator[tuple[int, End], None, None]:
    base, runs = None, dict[int, Run]()
    for who, request in enumerate(requests):
        try:
            request.out.mkdir(parents=True, exist_ok=True)
            request.on_event(Stage(stage="loading", message=f"Loading {request.spec.model.id}"))
            require_readable(request.spec.data)
            base = base or open_base(request.spec, request.out, request.on_event, world=world)
            world = base.world
            runs[who] = _begin(request, base, world, sharing=len(requests))
        except Exception as error:
            yield who, isolation.end_of(error, alone=len(requests) == 1)
    if base is None or not runs:
        return
    members = fit(base.model, [_member(one) for one in runs.values()], lay=base.lay, world=world)
    names, training, waiting = list(runs), set(runs), dict[int, Ending]()
    with closing(train(base.model, members, lay=base.lay, world=world)) as trained, _closing(waiting):
        for ended in trained:
            endings = {names[index]: Ending(runs[names[index]], end, world) for index, end in ended}
            waiting |= endings
            training -= endings.keys()
            if not training:
                break
            for who, ending in endings.items():
                try:
                    ending.observe()
                    end = ending.conclude(beside=True)
                except Stopped as stop:
                    trained.throw(stop)  # who still trains keeps the steps that were taken
                    raise
                if end is not None:
                    del waiting[who]
                    yield who, end
        trained.close()  # it holds on to the base
        for ending in waiting.values():
            ending.observe()
        base.release()
        for who, ending in waiting.items():
            end = ending.conclude(beside=False)
            assert end is not None
            yield who, end


@contextmanager
def _closing(waiting: dict[int, Ending]) -> Iterator[None]:
    try:
        yield
    finally:
        for ending in waiting.values():
            ending.close()


def _begin(request: Request, base: Base, world: World, *, sharing: int) -> Run:
    """Load what this run learns from, and initialize its adapter or take it from a checkpoint."""
    started, say = time.monotonic(), request.on_event
    point = request.spec.resume_from
    known = checkpoint.manifest_of(Path(point)) if point else {}
    job = prepare(request.spec, base, say, sharing=sharing, known=known.get("passes"))
    if world.leads:
        delivery.write_spec(job, request.out)
    restored = checkpoint.read(Path(point), recipe=job.recipe) if point else None
    say(job.plan)
    say(Stage(stage="initializing", message=f"Initializing with {job.lora.method.method}"))
    job.proof = proof.prove(job, request.out, say, known=known.get("proof"))
    report = _resume(job, restored) if restored else stage.start(job, say)
    world.agree(
        [t for layer in job.layers.values() for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))]
    )
    say(InitReport(report=report.summary))
    return Run(job, report, restored, request.out, say, sharing == 1, started)


def _member(one: Run) -> Member:
    job = one.job
    return Member(
        layers=job.layers,
        data=job.data,
        valid=job.valid,
        recipe=job.training,
        seed=job.spec.seed,
        budget=job.budget._replace(packed=job.base.packs),
        keeps_budget=job.passes.kept,
        recomputes=job.passes.recomputed,
        out=one.out,
        checkpoint_recipe=job.recipe,
        write_adapter=lambda folder: delivery.write_adapter(job, folder, one.report),
        skip=job.lora.method.batches_used(one.report.summary),
        regime=job.base.regime,
        resumed=one.restored,
        on_event=one.on_event,
        on_budget=partial(_change_budget, one),
        on_recompute=partial(_note_recomputed, one),
        on_shortage=partial(_count_shortage, one),
    )


def _change_budget(one: Run, tokens: int) -> None:
    """Tell again what will run, where memory has changed it."""
    if one.job.change_passes(tokens=tokens):
        one.on_event(one.job.plan)


def _note_recomputed(one: Run) -> None:
    one.job.change_passes(recomputed=True)


def _count_shortage(one: Run) -> None:
    one.retries += 1


# --- going on from a checkpoint ------------------------------------------------------------------


def _resume(job: Job, restored: Restored) -> Report:
    """The layers as the checkpoint has them, and the report of the initialization they came from."""
    job.layers = checkpoint.layers_of(job.targets, job.lora, restored)
    report = json.loads((restored.folder / "adapter" / "init_report.json").read_text())
    modules = report.pop("per_module")
    return Report(report, modules)
