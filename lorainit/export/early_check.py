"""Makes the export check before the first step, with a trial adapter of the shape that will be trained.

If PEFT cannot read such an adapter on this base, or computes something else with it, the run fails here in seconds
instead of after the training. The trial adapter has random factors, because most methods start with a product of zero,
with which every comparison would succeed. The run's own adapter is neither used nor changed.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorainit.config.errors import ExportCheckFailed, LorainitError, UnsupportedModel
from lorainit.config.events import Message
from lorainit.config.spec import Lora
from lorainit.context import Run
from lorainit.export import check, outputs
from lorainit.export.effect import Effect, logits_of, observe
from lorainit.model.layers.experts import short_name
from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import LoRALinear, attach_temporarily
from lorainit.model.layers.weight import shape_of
from lorainit.model.load import free_model
from lorainit.model.sharded_load import reset_failed_pass
from lorainit.runtime.devices import is_out_of_memory, make_generator, package_versions
from lorainit.runtime.disk_cache import make_key
from lorainit.runtime.distributed.run_errors import release_frames
from lorainit.runtime.machine_errors import is_machine_failure

ROWS, TOKENS = 2, 32
SIZE = 0.05  # of what a layer of a trained model makes of its input: an adapter that does something, and not too much
_READERS = ("peft", "transformers", "torch")
_FACTS = ("modules", "max_module_difference", "relative_logit_difference", "arithmetic", "loaders", "seconds")


def check_export_early(run: Run, *, known: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Show that stock PEFT reads adapters of this run's layout on this base; the model stays bare.

    Args:
        known: what an earlier attempt of this run returned.

    Returns:
        What was shown and with which versions, for the manifest; None where there is no room for a second base.

    Raises:
        ExportCheckFailed: PEFT cannot read it, or makes something else of it.
        UnsupportedModel: the base does not run with adapted layers, what it makes of the rows is not finite, or
            adapters change nothing of it.
    """
    if known and known["versions"] == _versions():
        return known
    layout = _layout(run)
    if layout in run.base.early_checks:
        return run.base.early_checks[layout]
    facts = _check_on_rank0(run)
    if facts is not None:
        run.base.early_checks[layout] = facts
    return facts


def _versions() -> dict[str, str | None]:
    return {name: value for name, value in package_versions().items() if name in _READERS}


def _layout(run: Run) -> str:
    """All that shapes an adapter's files and the way in which a loader reads them."""
    lora = run.lora
    return make_key(
        targets=list(run.targets),
        lora=[lora.r, lora.scaling, lora.use_rslora, lora.use_dora, lora.quantization],
        method=[lora.method.offset, lora.method.export_rank],
    )


def _check_on_rank0(run: Run) -> dict[str, Any] | None:
    """What the leading process finds; where it finds a fault, all of them end."""
    world, error, facts = run.base.world, None, None
    try:
        if world.is_rank0 or run.base.sharded:
            facts = _try_export(run)
    except LorainitError as fault:
        error = fault
    if world.any_rank(error is not None, run.base.device):
        raise error or ExportCheckFailed("The leading process found that stock PEFT does not read the adapter.")
    return facts


def _try_export(run: Run) -> dict[str, Any] | None:
    layers = make_trial_adapter(run.targets, run.lora, device=run.base.device)
    effect = _effect(run, layers)
    if not run.base.world.is_rank0:
        return None
    with _temporary_folder(run.out) as folder:
        outputs.write_factors(run, layers, folder)
        layers.clear()
        result = _compare(run, folder, effect)
    if result is None:
        text = "There is no room for a second copy of the base, so stock PEFT reads the adapter at the end only"
        run.emit(Message(level="warn", message=text, data={"kind": "export", "proof": None}))
        return None
    if not result["passed"]:
        raise ExportCheckFailed(
            f"Stock PEFT {result['loaders'][0]['version']} does not make of this base and these target modules what is"
            f" trained here, so nothing was trained: {result['message']}."
        )
    facts = {name: result[name] for name in _FACTS} | {"versions": _versions()}
    text = (
        f"Stock PEFT {facts['versions']['peft']} reads what this run will export: {facts['modules']} layers were"
        f" compared one by one, and differ by at most {facts['max_module_difference']:.1g} of what they add"
    )
    run.emit(Message(message=text, data={"kind": "export", "proof": facts}))
    return facts


@contextmanager
def _temporary_folder(out: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=".proof-", dir=out))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- the trial -----------------------------------------------------------------------------------


@torch.no_grad()
def make_trial_adapter(targets: dict[str, nn.Module], lora: Lora, *, device: torch.device) -> dict[str, LoRALinear]:
    """Layers of the shapes that will be trained, away from their start, with factors of their own.

    Where a method spreads ranks over layers, every other layer gets a rank less.
    """
    layers = {}
    for number, (name, module) in enumerate(targets.items()):
        rank = lora.r - number % 2 if lora.method.export_rank == "per module" and lora.r > 1 else lora.r
        out, n = shape_of(module)
        generator = make_generator(0, f"trial of {name}")
        A, B = torch.randn(rank, n, generator=generator), torch.randn(out, rank, generator=generator)
        # A·x is then as large as x is, and s·B·A·x is SIZE of that.
        start = Factors(A=(A / n**0.5).to(device), B=(B * SIZE / (lora.scaling * rank**0.5)).to(device))
        layer = LoRALinear(
            module, start, scale=lora.scaling, subtract=lora.method.offset == "subtract", dora=lora.use_dora
        )
        for parameter in layer.trained().values():
            noise = torch.randn(parameter.shape, generator=generator).to(device)
            parameter.add_(0.3 * noise * parameter.square().mean().sqrt())
        layers[name] = layer
    return layers


def _effect(run: Run, layers: dict[str, LoRALinear]) -> Effect:
    texts = check.prompts(run.data.samples, rows=ROWS, tokens=TOKENS)
    try:
        effect = observe(run.base.model, layers, texts, divided=bool(run.base.sharded), on_event=run.emit)
    except check.FAULTS as error:
        if is_machine_failure(error):
            raise
        reset_failed_pass(run.base.model)
        name = _find_culprit(run, layers)
        raise UnsupportedModel(
            f"The base model does not run with adapted layers ({name}): {check.short(error)}. Leave them out of"
            " target_modules.",
            param="lora.target_modules",
        ) from error
    if not all(logits.isfinite().all() for logits in effect.logits):
        raise UnsupportedModel(
            "What the base model makes of the first training rows is not finite: weights that overflow on them are the"
            " usual cause.",
            param="model",
        )
    if effect.absent:
        raise UnsupportedModel(
            "Nothing that adapters do to these layers reaches what the base model says: with drawn ones, its logits for"
            " the first training rows stay the same. Weights whose size drowns everything else are the usual cause.",
            param="model",
        )
    return effect


def _find_culprit(run: Run, layers: dict[str, LoRALinear]) -> str:
    """The first layer with which alone the model does not run, or the first of all."""
    text = [torch.zeros(2, dtype=torch.long)]
    kinds = {short_name(name, layers[name].base): name for name in reversed(layers)}
    for name in reversed(kinds.values()):
        try:
            with attach_temporarily(run.base.model, {name: layers[name]}):
                logits_of(run.base.model, text, dtype=None, on_event=run.emit)
        except check.FAULTS as error:
            if is_machine_failure(error):
                raise
            reset_failed_pass(run.base.model)
            return name
    return next(iter(layers))


# --- the second base -----------------------------------------------------------------------------


def _compare(run: Run, folder: Path, effect: Effect) -> dict[str, Any] | None:
    """What the check says on a copy of the base, or None where there is no room for one."""
    for place in run.base.devices_for_copy(tokens=TOKENS, factors=run.plan.trainable_parameters):
        try:
            return _compare_on(place, run, folder, effect)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            release_frames(error)  # it was measured, but others may use the device too
    return None


def _compare_on(place: torch.device, run: Run, folder: Path, effect: Effect) -> dict[str, Any]:
    base = run.base.copy_on(place)
    try:
        return check.check(
            base,
            folder,
            effect,
            source_rank=run.lora.r,
            base_sha256=run.base.sha256,
            layers_only=bool(run.base.sharded),
            on_event=run.emit,
        )[0]
    finally:
        free_model(base)
