"""Makes the export check before the first step, with a trial adapter of the shape that will be trained.

If PEFT cannot read such an adapter on this base, or computes something else with it, the run fails here in seconds
instead of after the training. The trial adapter has random factors because most methods start with a product of zero,
and with a product of zero every comparison would succeed. The run's own adapter is neither used nor changed.
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
SIZE = 0.05  # norm of what the trial adapter adds, relative to its input: large enough to show, small enough to be real
_READERS = ("peft", "transformers", "torch")
_FACTS = ("modules", "max_module_difference", "relative_logit_difference", "arithmetic", "loaders", "seconds")


def check_export_early(run: Run, *, known: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Check that stock PEFT reads adapters of this run's layout on this base. The model carries no adapter afterwards.

    The result is kept for the base, so that runs of one group with the same layout are checked once.

    Args:
        known: what an earlier attempt of this run returned; used again if the packages' versions are the same.

    Returns:
        The result and the packages' versions, for the manifest; None if there is no memory for a second base.

    Raises:
        ExportCheckFailed: PEFT cannot read the adapter, or computes something else with it.
        UnsupportedModel: the base does not run with adapted layers, its logits are not finite, or adapters do not
            change them.
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
    """A key of everything that changes an adapter's files or how a loader reads them."""
    lora = run.lora
    return make_key(
        targets=list(run.targets),
        lora=[lora.r, lora.scaling, lora.use_rslora, lora.use_dora, lora.quantization],
        method=[lora.method.offset, lora.method.export_rank],
    )


def _check_on_rank0(run: Run) -> dict[str, Any] | None:
    """Check on rank 0, or on all processes if they share the base; if it fails in one, all raise an error."""
    world, error, facts = run.base.world, None, None
    try:
        if world.is_rank0 or run.base.sharded:
            facts = _try_export(run)
    except LorainitError as fault:
        error = fault
    if world.any_rank(error is not None, run.base.device):
        raise error or ExportCheckFailed("Rank 0 of this run found that stock PEFT does not read the adapter.")
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
        text = "There is no memory for a second copy of the base, so stock PEFT reads the adapter only at the end"
        run.emit(Message(level="warn", message=text, data={"kind": "export", "proof": None}))
        return None
    if not result["passed"]:
        raise ExportCheckFailed(
            f"Stock PEFT {result['loaders'][0]['version']} would not compute what is trained here with this base and"
            f" these target modules, so nothing was trained: {result['message']}."
        )
    facts = {name: result[name] for name in _FACTS} | {"versions": _versions()}
    largest = facts["max_module_difference"]
    found = f"they differ by at most {largest:.1g} of what they add" if largest else "there is no difference"
    text = (
        f"Stock PEFT {facts['versions']['peft']} reads what this run will export: {facts['modules']} layers were"
        f" compared one by one, and {found}"
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
    """Layers of the shapes that will be trained, with random factors that have already moved from their start.

    They have moved so that the difference form is checked with a difference that is not zero. If the method spreads
    ranks over layers, every other layer gets one rank less, so that unequal ranks are checked too.
    """
    layers = {}
    for number, (name, module) in enumerate(targets.items()):
        rank = lora.r - number % 2 if lora.method.export_rank == "per module" and lora.r > 1 else lora.r
        out, n = shape_of(module)
        generator = make_generator(0, f"trial of {name}")
        A, B = torch.randn(rank, n, generator=generator), torch.randn(out, rank, generator=generator)
        # Scaled so that A·x is about as large as x, and s·B·A·x about SIZE times as large.
        start = Factors(A=(A / n**0.5).to(device), B=(B * SIZE / (lora.scaling * rank**0.5)).to(device))
        layer = LoRALinear(
            module, start, scale=lora.scaling, subtract=lora.method.offset == "subtract", dora=lora.use_dora
        )
        for parameter in layer.trained_parameters().values():
            noise = torch.randn(parameter.shape, generator=generator).to(device)
            parameter.add_(0.3 * noise * parameter.square().mean().sqrt())
        layers[name] = layer
    return layers


def _effect(run: Run, layers: dict[str, LoRALinear]) -> Effect:
    texts = check.make_prompts(run.data.samples, rows=ROWS, tokens=TOKENS)
    try:
        effect = observe(run.base.model, layers, texts, divided=bool(run.base.sharded), on_event=run.emit)
    except check.FAULTS as error:
        if is_machine_failure(error):
            raise
        reset_failed_pass(run.base.model)
        name = _find_culprit(run, layers)
        raise UnsupportedModel(
            f"The base model does not run with adapted layers ({name}): {check.summarize_error(error)}. Leave them out"
            " of target_modules.",
            param="lora.target_modules",
        ) from error
    if not all(logits.isfinite().all() for logits in effect.logits):
        raise UnsupportedModel(
            "The base model's logits for the first training rows are not finite. The usual cause is a weight that makes"
            " them overflow.",
            param="model",
        )
    if effect.absent:
        raise UnsupportedModel(
            "Adapters on these layers do not change the base model's logits: with random adapters, the logits for the"
            " first training rows stay the same. The usual cause is a weight so large that everything else is lost in"
            " rounding.",
            param="model",
        )
    return effect


def _find_culprit(run: Run, layers: dict[str, LoRALinear]) -> str:
    """The first layer that the model does not run with when it alone is adapted; the first layer if there is none."""
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
    """The result of the check on a copy of the base, or None if there is no memory for one."""
    for device in run.base.list_devices_for_copy(tokens=TOKENS, factors=run.plan.trainable_parameters):
        try:
            return _compare_on(device, run, folder, effect)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            release_frames(error)  # enough was free when it was measured, but other processes use the device too
    return None


def _compare_on(device: torch.device, run: Run, folder: Path, effect: Effect) -> dict[str, Any]:
    base = run.base.copy_on(device)
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
