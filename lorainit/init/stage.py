"""The initialization as a stage of a run: evidence and starts from the cache where an earlier run paid for them.

Says what a stored start depends on. Which rows are looked at is decided here; what is made of them, in `evidence`
and `methods`.
"""

import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lorainit.config.events import Message, Tick
from lorainit.config.kept import entry_name
from lorainit.data.batches import Batch, batches, collate, order
from lorainit.data.dataset import Sample
from lorainit.init.cache import Cache, data_digest
from lorainit.init.evidence import Evidence
from lorainit.init.evidence.collect import collect
from lorainit.init.evidence.context import Context
from lorainit.init.initialize import Known, Report, initialize
from lorainit.init.report import mean_loss
from lorainit.model.base import OnEvent
from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import detach
from lorainit.prepare import Job
from lorainit.runtime.retry import until_it_fits
from lorainit.runtime.store import key

PROBE_ROWS, PROBE_TOKENS = 4, 256
WORTH_KEEPING_SECONDS = 1.0  # a start that took less is made faster than it is read


def start(job: Job, on_event: OnEvent) -> Report:
    """Collect what the method needs, or find it in the cache, and make `job.layers`; the model stays bare.

    Raises:
        UnsupportedInit, InitFailed: as `collect` and `initialize`.
    """
    started = time.monotonic()
    context = _context(job, on_event)
    store, keys = _cache(job, on_event), _keys(job, context)
    known = store.starts(keys.starts)
    evidence, cached = ({}, True) if known else _evidence(context, store, keys)
    report = initialize(
        job.base.model,
        job.targets,
        job.lora,
        seed=job.spec.seed,
        probe=_probe(job),
        on_event=on_event,
        evidence=evidence,
        known=known,
        calibration=[] if job.lora.method.function_preserving else _calibration(context),
        weight_decay=job.training.weight_decay,
        rate=job.training.learning_rate or 0.0,
        started=started,
        cached=cached,
    )
    job.layers = detach(job.base.model)
    report.summary["base_valid_loss"] = _base_valid_loss(job, on_event)
    if known is None and report.summary["seconds"] >= WORTH_KEEPING_SECONDS:
        layers = job.layers
        starts = {m["name"]: Known(Factors(A=layers[m["name"]].A, B=layers[m["name"]].B), m) for m in report.modules}
        store.keep_starts(keys.starts, starts)
    return report


def _context(job: Job, on_event: OnEvent) -> Context:
    return Context(
        model=job.base.model,
        targets=job.targets,
        samples=job.calibration.samples if job.calibration else job.data.samples,
        training_samples=job.data.samples,
        pad=job.base.pad,
        device=job.base.device,
        budget=job.budget,
        lora=job.lora,
        training=job.training,
        total_steps=job.plan.total_steps,
        seed=job.spec.seed,
        on_event=on_event,
        order=lambda epoch: order(job.data, seed=job.spec.seed, epoch=epoch),
        folder=job.base.location.folder,
        regime=job.base.regime,
        anybody=lambda flag: job.base.world.anybody(flag, job.base.device),
        divided=bool(job.base.sharded),
    )


def _probe(job: Job) -> Batch:
    """A few short training rows that may share a pass; those whose first trained token comes late are taken whole."""
    rows = [
        Sample(s.line, s.ids[:PROBE_TOKENS], s.trained[:PROBE_TOKENS])
        for s in job.data.samples
        if s.trained[1:PROBE_TOKENS].any()
    ]
    rows, regime = (rows or job.data.samples)[:PROBE_ROWS], job.base.regime
    kind = regime(len(rows[0].ids))
    alike = rows[:1] if kind is None else [row for row in rows if regime(len(row.ids)) == kind]
    return collate(alike, pad=job.base.pad).to(job.base.device)


def _calibration(context: Context) -> list[Batch]:
    """The rows that a displaced start was made from, in passes that fit the device."""
    rows = [s for s in context.samples if s.trained[1:].any()]
    rows = rows[: getattr(context.lora.method, "samples", PROBE_ROWS)]
    pieces = batches(rows, context.budget, context.regime)
    return [collate(piece, pad=context.pad).to(context.device) for piece in pieces]


def _base_valid_loss(job: Job, on_event: OnEvent) -> float | None:
    """The bare base's loss on the validation rows, where a displaced start hides it; None where the start shows it."""
    if job.valid is None or job.lora.method.function_preserving:
        return None
    pieces = batches(job.valid.samples, job.budget, job.base.regime)
    rows = (collate(piece, pad=job.base.pad).to(job.base.device) for piece in pieces)
    loss = mean_loss(job.base.model, rows, tick=lambda done: on_event(Tick(done=done, total=len(pieces))))
    return loss if math.isfinite(loss) else None


# --- what earlier runs found out ----------------------------------------------------------------


class _Keys(NamedTuple):
    evidence: str
    starts: str


def _cache(job: Job, on_event: OnEvent) -> Cache:
    """A run without a cache folder keeps nothing, nor do processes that must all find the same in it or nothing."""
    folder, limit = job.spec.cache, 0 if job.base.sharded else job.spec.cache_limit_bytes
    return Cache(Path(folder or job.base.location.folder) / "init", limit if folder else 0, on_event)


def _evidence(context: Context, store: Cache, keys: _Keys) -> tuple[dict[str, Evidence], bool]:
    """The evidence, and whether it came from the cache."""
    config = context.lora.method
    if config.facts.needs in ("none", "weight"):
        return collect(config, context), False
    found = store.evidence(keys.evidence)
    if found is not None:
        return found, True
    found = _collected(context)
    store.keep_evidence(keys.evidence, found)
    return found, False


def _collected(context: Context) -> dict[str, Evidence]:
    """The evidence; where memory runs out, all of it again in passes half as large, as long as that changes any."""
    longest = max(len(sample.ids) for sample in (*context.samples, *context.training_samples))

    def halve() -> bool:
        nonlocal context
        tokens = max(longest, context.budget.tokens // 2)
        if tokens >= context.budget.tokens:
            return False
        context = replace(context, budget=context.budget._replace(tokens=tokens))
        text = f"Memory ran out while evidence was collected: again, in passes over {tokens:,} tokens at most"
        data = {"kind": "oom_retry", "tokens_per_pass": tokens}
        context.on_event(Message(level="warn", message=text, data=data))
        return True

    if context.divided:  # the others are in the middle of the same passes
        return collect(context.lora.method, context)
    return until_it_fits(lambda: collect(context.lora.method, context), halve)


def _keys(job: Job, context: Context) -> _Keys:
    """Everything that shapes evidence and starts; the seed only where it does."""
    config = job.lora.method
    seed = config.seed_for(job.spec.seed)
    looks_at_data = config.facts.needs not in ("none", "weight")
    parts: dict[str, Any] = {
        "base": job.base.sha256,
        "method": config.model_dump(mode="json", exclude={"seed", "calibration_file", "export_ranks"}),
        "lora": [job.lora.r, job.lora.scaling],
        "quantization": job.base.four_bits and [job.lora.quantization, job.base.four_bits.skip],
        "targets": list(job.targets),
        "device": job.base.device.type,
        "precision": job.plan.precision,
        "data": data_digest(context.samples) if looks_at_data else None,
        "budget": job.budget if looks_at_data else None,
    }
    if config.facts.needs == "preheat":
        recipe = job.training.model_dump(mode="json"), job.data.sha256, job.plan.total_steps, job.spec.seed
        parts |= {"recipe": recipe}
    evidence = key(**parts, part="evidence", seed=seed if config.drawn == "evidence" else None)
    starts = key(**parts, part="starts", seed=None if config.drawn == "nothing" else seed, dora=job.lora.use_dora)
    named = partial(entry_name, owner=job.spec.data.owner, files=_files_looked_at(job))
    return _Keys(named(evidence), named(starts))


def _files_looked_at(job: Job) -> list[str]:
    """SHA-256 of the files whose rows shape the evidence, and so the start."""
    needs = job.lora.method.facts.needs
    if needs in ("none", "weight"):
        return []
    rows = job.calibration or job.data
    return [rows.sha256, job.data.sha256] if needs == "preheat" else [rows.sha256]
