"""The initialization as a stage of a run: it takes evidence and starts from the cache if an earlier run stored them.

It chooses the rows that are used, and the keys of the cache, which contain everything that a start depends on.
"""

import math
import time
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from lorainit.config.cache_names import entry_name
from lorainit.config.events import Tick
from lorainit.context import Report, Run
from lorainit.data.batches import Batch, collate, split_into_batches
from lorainit.data.dataset import Sample
from lorainit.init.cache import Cache, data_digest
from lorainit.init.collectors.collect import collect
from lorainit.init.evidence import Evidence
from lorainit.init.initialize import CachedStart, initialize
from lorainit.init.report import mean_loss
from lorainit.model.base import open_disk_cache
from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import detach
from lorainit.runtime.disk_cache import make_key
from lorainit.runtime.retry import retry_until_it_fits

PROBE_ROWS, PROBE_TOKENS = 4, 256
WORTH_KEEPING_SECONDS = 1.0  # a start that took less is not stored, because computing it is faster than reading it


def start(run: Run) -> Report:
    """Make the run's layers and report, computed or from the cache. No adapter is attached to the model afterwards.

    Raises:
        UnsupportedInit, InitFailed: as `collect` and `initialize`.
    """
    started = time.monotonic()
    cache, keys = _open_cache(run), _keys(run)
    known = cache.read_starts(keys.starts)
    evidence, cached = ({}, True) if known else _evidence(run, cache, keys)
    report = initialize(
        run.model,
        run.targets,
        run.lora,
        seed=run.spec.seed,
        probe=_probe(run),
        on_event=run.emit,
        evidence=evidence,
        known=known,
        calibration=[] if run.lora.method.function_preserving else _calibration(run),
        weight_decay=run.training.weight_decay,
        rate=run.training.learning_rate or 0.0,
        started=started,
        cached=cached,
    )
    run.layers = detach(run.model)
    report.summary["base_valid_loss"] = _base_valid_loss(run)
    if known is None and report.summary["seconds"] >= WORTH_KEEPING_SECONDS:
        layers = run.layers
        starts = {
            m["name"]: CachedStart(Factors(A=layers[m["name"]].A, B=layers[m["name"]].B), m) for m in report.modules
        }
        cache.keep_starts(keys.starts, starts)
    run.report = report
    return report


def _probe(run: Run) -> Batch:
    """A few training rows that may share a pass, cut to `PROBE_TOKENS`.

    If no row has a trained token that early, whole rows are used, since a row without one has no loss.
    """
    rows = [
        Sample(s.line, s.ids[:PROBE_TOKENS], s.trained[:PROBE_TOKENS])
        for s in run.data.samples
        if s.trained[1:PROBE_TOKENS].any()
    ]
    rows, regime = (rows or run.data.samples)[:PROBE_ROWS], run.regime
    kind = regime(len(rows[0].ids))
    alike = rows[:1] if kind is None else [row for row in rows if regime(len(row.ids)) == kind]
    return collate(alike, pad=run.base.pad).to(run.device)


def _calibration(run: Run) -> list[Batch]:
    """The rows that a displaced start was made from, in passes that fit the device."""
    rows = [s for s in run.samples if s.trained[1:].any()]
    rows = rows[: getattr(run.lora.method, "samples", PROBE_ROWS)]
    pieces = split_into_batches(rows, run.budget, run.regime)
    return [collate(piece, pad=run.base.pad).to(run.device) for piece in pieces]


def _base_valid_loss(run: Run) -> float | None:
    """The base's loss on the validation rows; None if there are none, or if the start is function-preserving.

    Only a displaced start needs it: any other has the base's loss, which the evaluation at step 0 shows.
    """
    if run.valid is None or run.lora.method.function_preserving:
        return None
    pieces = split_into_batches(run.valid.samples, run.budget, run.regime)
    rows = (collate(piece, pad=run.base.pad).to(run.device) for piece in pieces)
    loss = mean_loss(run.model, rows, tick=lambda done: run.emit(Tick(done=done, total=len(pieces))))
    return loss if math.isfinite(loss) else None


# --- the cache -----------------------------------------------------------------------------------


class _Keys(NamedTuple):
    evidence: str
    starts: str


def _open_cache(run: Run) -> Cache:
    """The cache of this run. It stores nothing if the run has no cache folder or its base is divided between devices.

    Processes of a divided base compute starts together, so one of them must not find an entry that another lacks.
    """
    entries = open_disk_cache(run.spec, "init", run.emit)
    return Cache(replace(entries, limit=0) if run.base.sharded else entries)


def _evidence(run: Run, cache: Cache, keys: _Keys) -> tuple[dict[str, Evidence], bool]:
    """The evidence, and whether it came from the cache."""
    config = run.lora.method
    # These are not stored, because they are empty or (loftq) read from the base's files when used.
    if config.facts.needs in ("none", "weight"):
        return collect(config, run), False
    found = cache.read_evidence(keys.evidence)
    # If one process finds no entry, all have to collect, because they do so together.
    if not run.base.world.any_rank(found is None, run.device):
        assert found is not None
        return found, True
    found = _collected(run)
    cache.keep_evidence(keys.evidence, found)
    return found, False


def _collected(run: Run) -> dict[str, Evidence]:
    """Collect the evidence. If memory runs out in any process, all of them begin again in smaller passes."""
    return retry_until_it_fits(
        lambda: collect(run.lora.method, run),
        lambda: run.halve_evidence(_largest_pass(run)),
        world=run.base.world,
        device=run.device,
    )


def _largest_pass(run: Run) -> list[Sample]:
    """The largest pass of the rows that the method uses, and perhaps of a few more. Only its size matters."""
    needs = run.lora.method.facts.needs
    rows = run.data.samples if needs == "preheat" else run.samples
    count = getattr(run.lora.method, "samples", len(rows))
    if needs == "gradient":  # twice as many, because the line search of lora_one uses the same number of further rows
        rows, count = [row for row in rows if row.trained[1:].any()], 2 * count
    return max(split_into_batches(rows[:count], run.evidence_budget, run.regime), key=run.evidence_budget.tokens_of)


def _keys(run: Run) -> _Keys:
    """The keys of evidence and starts, made of everything that they depend on.

    The seed is left out for methods that draw no random numbers, so that runs with other seeds find the same entry.
    """
    config = run.lora.method
    seed = config.seed_for(run.spec.seed)
    looks_at_data = config.facts.needs not in ("none", "weight")
    parts: dict[str, Any] = {
        "base": run.base.sha256,
        "method": config.model_dump(mode="json", exclude={"seed", "calibration_file", "export_ranks"}),
        "lora": [run.lora.r, run.lora.scaling],
        "quantization": run.base.four_bits and [run.lora.quantization, run.base.four_bits.skip],
        "targets": list(run.targets),
        "device": run.device.type,
        "precision": run.plan.precision,
        "data": data_digest(run.samples) if looks_at_data else None,
        "budget": run.budget if looks_at_data else None,
    }
    if config.facts.needs == "preheat":
        recipe = run.training.model_dump(mode="json"), run.data.sha256, run.plan.total_steps, run.spec.seed
        parts |= {"recipe": recipe}
    evidence = make_key(**parts, part="evidence", seed=seed if config.randomness == "evidence" else None)
    starts = make_key(
        **parts, part="starts", seed=None if config.randomness == "nothing" else seed, dora=run.lora.use_dora
    )
    named = partial(entry_name, owner=run.spec.data.owner, files=_files_looked_at(run))
    return _Keys(named(evidence), named(starts))


def _files_looked_at(run: Run) -> list[str]:
    """SHA-256 of the files that the evidence, and so the start, depends on. An entry is deleted with its files."""
    needs = run.lora.method.facts.needs
    if needs in ("none", "weight"):
        return []
    rows = run.calibration or run.data
    return [rows.sha256, run.data.sha256] if needs == "preheat" else [rows.sha256]
