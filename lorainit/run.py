"""The recipe: load, initialize, train, export, verify. From a spec to an adapter, or from several to as many.

`run` is the library's front door. It talks through `on_event` only, and leaves in `out` what it
made: `adapter/`, `checkpoints/`, `metrics.jsonl`, `step_metrics.csv`, `spec.json` (resolved).
"""

import errno
import json
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorainit import checkpoint, delivery, hardware, init_stage, proof
from lorainit.base import Base, OnEvent, open_base
from lorainit.checkpoint import Progress, Restored
from lorainit.course import Member
from lorainit.data import require_readable
from lorainit.errors import DiskFull, LorainitError, OutOfMemory, Stopped, UnsupportedModel
from lorainit.events import Done, InitReport, Message, Stage
from lorainit.fit import fit
from lorainit.initialize import Report
from lorainit.inits import HRP
from lorainit.prepare import Job, prepare, with_micro_batch
from lorainit.spec import Hyperparameters, RunSpec
from lorainit.train import train
from lorainit.verdict import judge, judge_effect
from lorainit.world import World, joined

End = Done | LorainitError


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

    Each gives the adapter that it would give alone. What one run does wrong ends that run and is
    yielded; what the machine does wrong, or a `Stopped`, ends all that have not ended and is raised.

    Raises:
        LorainitError: as for `run`.
    """
    first = requests[0].spec
    with (
        _as_our_errors(),
        hardware.reproducible(first.seed, deterministic=first.deterministic),
        joined(hardware.pick_device()) as world,
        closing(_together(requests, world)) as ends,
    ):
        yield from ends


@dataclass
class _Run:
    """One request, initialized."""

    request: Request
    job: Job
    report: Report
    restored: Restored | None
    started: float
    retries: int = 0  # how often memory ran out before it fitted


def _together(requests: Sequence[Request], world: World) -> Generator[tuple[int, End], None, None]:
    base, runs = None, dict[int, _Run]()
    for who, request in enumerate(requests):
        try:
            request.out.mkdir(parents=True, exist_ok=True)
            request.on_event(Stage(stage="loading", message=f"Loading {request.spec.model.id}"))
            require_readable(request.spec.data)
            base = base or open_base(request.spec, request.out, request.on_event, world=world)
            world = base.world
            runs[who] = _begin(request, base, world, sharing=len(requests))
        except Stopped:
            raise
        except LorainitError as error:
            yield who, error
    if base is None or not runs:
        return
    left = list(runs)
    fitted = fit(base.model, [_member(one) for one in runs.values()], lay=base.lay, world=world)
    for one, member in zip(runs.values(), fitted.members, strict=True):
        _fitted(one, member, fitted.retries)
    with closing(train(base.model, fitted.members, lay=base.lay, world=world)) as ends:
        for index, end in ends:
            who = list(runs)[index]
            left.remove(who)
            if not left:
                break  # the trained model makes room before the adapter is checked on a fresh one
            yield who, _end(runs[who], end, world, last=False)
    yield who, _end(runs[who], end, world, last=True)


def _begin(request: Request, base: Base, world: World, *, sharing: int) -> _Run:
    """Load what this run learns from, and initialize its adapter or take it from a checkpoint."""
    started, say = time.monotonic(), request.on_event
    job = prepare(request.spec, base, say, sharing=sharing)
    if world.leads:
        delivery.write_spec(job, request.out)
    say(job.plan)
    restored = _restored(job)
    say(Stage(stage="initializing", message=f"Initializing with {job.lora.method.method}"))
    job.proof = proof.prove(job, request.out, say, known=_proof(restored))
    report = _resume(job, restored) if restored else init_stage.start(job, say)
    world.agree(
        [t for layer in job.layers.values() for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))]
    )
    say(InitReport(report=report.summary))
    return _Run(request, job, report, restored, started)


def _member(one: _Run) -> Member:
    job = one.job
    return Member(
        layers=job.layers,
        data=job.data,
        valid=job.valid,
        recipe=job.training,
        seed=job.spec.seed,
        micro_batch_size=job.plan.micro_batch_size,
        out=one.request.out,
        checkpoint_recipe=job.recipe,
        write_adapter=lambda folder: delivery.write_adapter(job, folder, one.report),
        skip=_skipped(job, one.report),
        regime=job.base.regime,
        resumed=one.restored,
        on_event=one.request.on_event,
    )


def _fitted(one: _Run, member: Member, retries: int) -> None:
    """Tell again what will run, where memory has changed it."""
    job, one.retries = one.job, retries
    if member.micro_batch_size != job.plan.micro_batch_size:
        job.plan = with_micro_batch(job.plan, member.micro_batch_size, job.training)
        one.request.on_event(job.plan)


def _end(one: _Run, end: Progress | LorainitError, world: World, *, last: bool) -> End:
    """Export and check what has been trained, or pass the error on."""
    if isinstance(end, LorainitError):
        return end
    try:
        return _deliver(one, end, last=last) if world.leads else _accompany(one, end, last=last)
    except Stopped:
        raise
    except LorainitError as error:
        return error


def _deliver(one: _Run, progress: Progress, *, last: bool) -> Done:
    job, out, say = one.job, one.request.out, one.request.on_event
    delivery.write_metrics(out)
    say(Stage(stage="exporting", message="Writing the adapter in PEFT's format"))
    with delivery.complete_or_absent(out / "adapter") as folder:
        delivery.write_adapter(job, folder, one.report)
        check = delivery.verify(job, folder, say, last=last)
        base = one.report.summary.get("base_valid_loss")
        warnings = judge(out / "metrics.jsonl", **_rates(job.training), base=base) + judge_effect(check)
        delivery.write_manifest(job, folder, one.report, export_check=check, warnings=warnings)
    for found in warnings:
        say(Message(level="warn", message=found.message, data={"kind": found.code, **found.data}))
    done = Done(
        adapter=str((out / "adapter").resolve()),
        trained_tokens=progress.tokens,
        warnings=warnings,
        export_check=check,
        resources=delivery.resources(job, one.report, out, seconds=time.monotonic() - one.started, retries=one.retries),
    )
    say(done)
    return done


def _rates(training: Hyperparameters) -> dict[str, float]:
    """The peak rate of a resolved recipe, and the one that a multiplier of 1 stands for."""
    assert training.learning_rate is not None and training.learning_rate_multiplier != "auto"
    return {"rate": training.learning_rate, "usual": training.learning_rate / training.learning_rate_multiplier}


def _accompany(one: _Run, progress: Progress, *, last: bool) -> Done:
    """The end of a process that trained along: the leading one writes the adapter, and needs our part to check it."""
    if one.job.base.sharded:
        delivery.verify(one.job, delivery.unproven(one.request.out / "adapter"), one.request.on_event, last=last)
    return Done(adapter=str(one.request.out / "adapter"), trained_tokens=progress.tokens, export_check={}, resources={})


# --- going on from a checkpoint ------------------------------------------------------------------


def _restored(job: Job) -> Restored | None:
    if job.spec.resume_from is None:
        return None
    return checkpoint.read(Path(job.spec.resume_from), recipe=job.recipe)


def _proof(restored: Restored | None) -> dict[str, Any] | None:
    """What the attempt that wrote the checkpoint had shown of its download."""
    if restored is None:
        return None
    manifest = json.loads((restored.folder / "adapter" / "manifest.json").read_text())
    known: dict[str, Any] | None = manifest.get("proof")
    return known


def _resume(job: Job, restored: Restored) -> Report:
    """The layers as the checkpoint has them, and the report of the initialization they came from."""
    job.layers = checkpoint.layers_of(job.targets, job.lora, restored)
    report = json.loads((restored.folder / "adapter" / "init_report.json").read_text())
    modules = report.pop("per_module")
    return Report(report, modules)


def _skipped(job: Job, report: Report) -> int:
    """Batches that the preheat has used up, where the main run is to go on after them."""
    method = job.lora.method
    return int(report.summary["preheat"]["steps"]) if isinstance(method, HRP) and method.main_data == "continue" else 0


# --- errors ------------------------------------------------------------------------------------


@contextmanager
def _as_our_errors() -> Iterator[None]:
    """Machine failures a caller can do something about, as errors with advice."""
    try:
        yield
    except MemoryError as error:
        raise _out_of_memory() from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"No space left to write {error.filename or 'the results'}.") from error
        raise
    except RuntimeError as error:
        text = str(error)
        if hardware.is_out_of_memory(error):
            raise _out_of_memory() from error
        if "No space left on device" in text:
            raise DiskFull("No space left to write the results.") from error
        if "deterministic" in text and "use_deterministic_algorithms" in text:
            raise UnsupportedModel(
                "This base model needs a kernel without a deterministic form: set deterministic to false.",
                param="deterministic",
            ) from error
        raise


def _out_of_memory() -> OutOfMemory:
    return OutOfMemory(
        "The device ran out of memory. A smaller max_length or batch_size, a lower r, or fewer target modules helps.",
        param="training.max_length",
    )
