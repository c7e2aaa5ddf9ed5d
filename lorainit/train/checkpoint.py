"""Checkpoints: the adapter in PEFT's format, and the training state as safetensors and JSON.

There are no pickles, because loading a pickle can run any code (docs/decisions/0008). A checkpoint is written to a
temporary folder, flushed to disk and then renamed, so that its folder is either complete or absent.
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
# What reading raises if a file is missing, is not JSON or not safetensors, or lacks an entry that we write.
_DAMAGE = (OSError, ValueError, SafetensorError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps, non-padding tokens, seconds of training.

    `unlogged`: the metrics of the last step, if its evaluation was not finished. They are logged together, so a resumed
    run evaluates first.
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
        recipe: what a resumed run must have in common with this one (hashes of spec, data and base).
        metrics: the run's log so far. A copy of it is stored, so that a resumed run continues a log that ends at the
            checkpoint's step.
        write_adapter: writes the adapter in PEFT's format into the folder it is given.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        write_adapter(work / "adapter")
        save_file(_tensors(layers, optimizer), work / STATE)
        facts = asdict(progress)
        facts["unsaid"] = facts.pop("unlogged")  # its name in the file, so that older checkpoints can be read
        (work / FACTS).write_text(json.dumps({**facts, "recipe": recipe}, indent=2) + "\n")
        shutil.copyfile(metrics, work / METRICS)
        work.chmod(0o755)  # `mkdtemp` makes folders that only their owner can read
        # Flushed before the rename: otherwise the folder could be there after a power failure, and its files empty.
        _flush(work)
        shutil.rmtree(folder, ignore_errors=True)  # because a folder cannot be renamed to one that has files
        work.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _tensors(layers: Mapping[str, LoRALinear], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Factors and optimizer state by name, on the CPU.

    The state of random generators is not needed, because row order and dropout depend only on the seed and the step.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for key, value in layer.state_dict().items():
            if not key.startswith("base."):
                tensors[f"layer.{name}.{key}"] = value.cpu().contiguous()
        for key, parameter in layer.trained_parameters().items():
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


# --- resuming ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was read. `restore` puts its state into a new optimizer.

    `report` and `modules`: the content of init_report.json, since a resumed run does not initialize again.
    """

    folder: Path
    progress: Progress
    tensors: dict[str, Tensor]
    report: dict[str, Any]
    modules: list[dict[str, Any]]

    def restore(self, layers: Mapping[str, LoRALinear], optimizer: torch.optim.Optimizer) -> None:
        """Set the state of the optimizer. The factors are in the layers already (`restore_layers`).

        Every tensor is copied, because the optimizer would otherwise change `tensors` in place.
        """
        found = self._states()
        counting = _counts_on_device(optimizer)
        for name, layer in layers.items():
            for key, parameter in layer.trained_parameters().items():
                beside = torch.device("cpu") if id(parameter) not in counting else parameter.device
                with _reading(self.folder):
                    state = found[f"{name}.{key}"]
                optimizer.state[parameter] = {
                    m: value.to(beside if m == "step" else parameter.device, copy=True) for m, value in state.items()
                }

    def _states(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's tensors by parameter, for any optimizer."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in self.tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                moment, _, parameter = rest.partition(".")
                found.setdefault(parameter, {})[moment] = value
        return found


def _counts_on_device(optimizer: torch.optim.Optimizer) -> set[int]:
    """Ids of the parameters whose `step` has to be on the parameter's own device.

    The fused kernel of AdamW reads `step` on the device, and crashes on a GPU if the tensor is on the CPU. Every other
    form keeps `step` on the CPU. torch's own `load_state_dict` has the same rule.
    """
    groups = (g for g in optimizer.param_groups if g.get("fused") or g.get("capturable"))
    return {id(parameter) for group in groups for parameter in group["params"]}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the attempt that wrote a checkpoint.

    Raises:
        CheckpointMismatch: it is incomplete or damaged.
    """
    with _reading(folder):
        return _object(folder / "adapter" / "manifest.json")


def read(folder: Path, *, recipe: dict[str, Any]) -> Restored:
    """Read a checkpoint back.

    Raises:
        CheckpointMismatch: it is incomplete or damaged, or was made by another recipe; the message says what differs.
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
    """Turn errors of reading into `CheckpointMismatch`.

    Errors of the host (a failing disk, no memory) are raised unchanged, because the job can then be tried again.
    """
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
    """Layers with the factors of a checkpoint, instead of initializing again.

    `A0` and `B0` are the start that is subtracted (docs/glossary.md, "difference form"). They are stored too, because
    the trained A and B do not tell where they started.

    Raises:
        CheckpointMismatch: it lacks the factors of a target, or is damaged.
    """
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
            for key, parameter in layer.trained_parameters().items():
                with _reading(restored.folder):
                    found = restored.tensors[f"layer.{name}.{key}"]
                parameter.copy_(found)
        layers[name] = layer
    return layers
