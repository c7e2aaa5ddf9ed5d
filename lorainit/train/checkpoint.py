"""A point a run can go on from: the adapter as plain PEFT, and the training state without pickles.

Written beside its final place, flushed, then renamed: a checkpoint folder is complete or absent.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorainit.config.errors import CheckpointMismatch
from lorainit.config.spec import Lora
from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import LoRALinear
from lorainit.model.layers.weight import device_of
from lorainit.runtime.devices import is_out_of_memory
from lorainit.system.host_failure import is_host_failure

STATE, FACTS, METRICS = "state.safetensors", "state.json", "metrics.jsonl"
REPORT = Path("adapter", "init_report.json")
# What reading raises of a file that is not there, is no JSON or no safetensors, or lacks what we write.
_DAMAGE = (OSError, ValueError, SafetensorError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps, non-padding tokens, seconds of training.

    `unlogged`: what the last step found, where the evaluation that is logged with it has not been finished.
    """

    step: int
    tokens: int
    seconds: float
    unlogged: dict[str, float] = field(default_factory=dict)


def write(
    folder: Path,
    layers: Mapping[str, LoRALinear],
    optimizer: torch.optim.Optimizer,
    *,
    progress: Progress,
    recipe: dict[str, Any],
    metrics: Path,
    write_adapter: Callable[[Path], None],
) -> None:
    """Write a complete checkpoint at `folder`.

    Args:
        recipe: what a run that resumes must share (hashes of spec, data and base).
        metrics: the run's log so far; it travels along, so no checkpoint is ahead of its metrics.
        write_adapter: writes the plain adapter into the folder it is given.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        write_adapter(work / "adapter")
        save_file(_tensors(layers, optimizer), work / STATE)
        (work / FACTS).write_text(json.dumps({**asdict(progress), "recipe": recipe}, indent=2) + "\n")
        shutil.copyfile(metrics, work / METRICS)
        work.chmod(0o755)
        _flush(work)
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _tensors(layers: Mapping[str, LoRALinear], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """No generator's state: the order of rows and dropout are functions of the seed and the step."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for key, value in layer.state_dict().items():
            if not key.startswith("base."):
                tensors[f"layer.{name}.{key}"] = value.cpu().contiguous()
        for key, parameter in layer.trained().items():
            state = optimizer.state[parameter]
            tensors |= {f"optimizer.{m}.{name}.{key}": value.cpu().contiguous() for m, value in state.items()}
    return tensors


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- going on ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restored:
    """A checkpoint read back; `restore` puts its state into a fresh optimizer.

    `report` and `modules`: what init_report.json says of the initialization that its factors came from.
    """

    folder: Path
    progress: Progress
    tensors: dict[str, Tensor]
    report: dict[str, Any]
    modules: list[dict[str, Any]]

    def restore(self, layers: Mapping[str, LoRALinear], optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's moments as they were; the factors are already in the layers."""
        found = self._states()
        counting = _counts_on_device(optimizer)
        for name, layer in layers.items():
            for key, parameter in layer.trained().items():
                beside = torch.device("cpu") if id(parameter) not in counting else parameter.device
                with _reading(self.folder):
                    state = found[f"{name}.{key}"]
                optimizer.state[parameter] = {
                    m: value.to(beside if m == "step" else parameter.device, copy=True) for m, value in state.items()
                }

    def _states(self) -> dict[str, dict[str, Tensor]]:
        """What the optimizer kept of each parameter, whichever optimizer it was."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in self.tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                moment, _, parameter = rest.partition(".")
                found.setdefault(parameter, {})[moment] = value
        return found


def _counts_on_device(optimizer: torch.optim.Optimizer) -> set[int]:
    """Ids of the parameters whose steps torch's AdamW counts beside them.

    Its fused kernel reads `step` on the device, and crashes on a GPU where it finds an address of the host; every
    other form keeps `step` on the CPU. The same rule as in torch's own `load_state_dict`.
    """
    groups = (g for g in optimizer.param_groups if g.get("fused") or g.get("capturable"))
    return {id(parameter) for group in groups for parameter in group["params"]}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the attempt that wrote a checkpoint knew of itself.

    Raises:
        CheckpointMismatch: it is incomplete or damaged.
    """
    with _reading(folder):
        return _object(folder / "adapter" / "manifest.json")


def read(folder: Path, *, recipe: dict[str, Any]) -> Restored:
    """Read a checkpoint back.

    Raises:
        CheckpointMismatch: it is incomplete or damaged, or another recipe made it; the message says what differs.
    """
    with _reading(folder):
        facts = _object(folder / FACTS)
        made_by = dict(facts["recipe"])
        progress = Progress(
            int(facts["step"]), int(facts["tokens"]), float(facts["seconds"]), dict(facts.get("unsaid", {}))
        )
        tensors, report = load_file(folder / STATE), _object(folder / REPORT)
        modules = report.pop("per_module")
        (folder / METRICS).open("rb").close()
    differing = sorted(k for k in recipe.keys() | made_by.keys() if recipe.get(k) != made_by.get(k))
    if differing:
        raise CheckpointMismatch(
            f"The checkpoint {folder.name} was made by another recipe: {', '.join(differing)} differ.",
            param="resume_from",
        )
    return Restored(folder, progress, tensors, report, modules)


def _object(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return found


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """What cannot be read inside is the checkpoint's fault, unless it is the host's: then it is raised as it is."""
    try:
        yield
    except _DAMAGE as error:
        if is_host_failure(error) or is_out_of_memory(error):
            raise
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointMismatch(
            f"The checkpoint {folder.name} is incomplete or damaged: {why}", param="resume_from"
        ) from error


def restore_layers(targets: dict[str, nn.Module], lora: Lora, restored: Restored) -> dict[str, LoRALinear]:
    """The layers with the checkpoint's factors, instead of initializing again."""
    layers: dict[str, LoRALinear] = {}
    subtract = lora.method.offset == "subtract"
    for name, module in targets.items():
        own = {k: restored.tensors.get(f"layer.{name}.{k}") for k in ("A", "B", "A0", "B0")}
        A, B, A0, B0 = (None if t is None else t.to(device_of(module)) for t in own.values())
        if A is None or B is None:
            raise CheckpointMismatch(f"The checkpoint has no factors for {name}.", param="resume_from")
        start = Factors(A, B) if A0 is None or B0 is None else Factors(A0, B0)
        layer = LoRALinear(
            module, start, scale=lora.scaling, subtract=subtract, dropout=lora.dropout, dora=lora.use_dora
        )
        with torch.no_grad():
            for key, parameter in layer.trained().items():
                with _reading(restored.folder):
                    found = restored.tensors[f"layer.{name}.{key}"]
                parameter.copy_(found)
        layers[name] = layer
    return layers
