"""Loads a sharded base so that each process reads only its own rows of each layer's weights from the files.

transformers can load a parameter in parts, with its usual renaming and its report of missing weights. This is used only
where the result is the same as loading the whole weight: weights that are stored as they are, and experts that are
stored one by one. Weights that transformers joins or splits along rows are loaded whole and divided afterwards
(`lorainit.model.shard`).
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from lorainit.config.errors import UnsupportedModel
from lorainit.model.forward.recompute import layers_of
from lorainit.model.load import load_model
from lorainit.model.source.examine import build, read_config
from lorainit.model.source.files import Stored, list_stored_weights

PARAM = "training.shard_base"


def load_shard(folder: Path, *, dtype: torch.dtype, device: torch.device, rank: int, size: int) -> nn.Module:
    """Load this process's part of a base; otherwise like `load_model`.

    Parameters outside of the layers are whole and on the CPU; the parts are DTensors on `device`.

    Raises:
        UnsupportedModel: as for `load_model`, and where its layers cannot be divided.
    """
    skeleton = build(read_config(folder))
    layers = divisible_layers(skeleton)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    names = [name for name, parameter in skeleton.named_parameters() if id(parameter) in inside]
    alike = _readable_in_parts(skeleton, list_stored_weights(folder), size=size)
    mesh = init_device_mesh(device.type, (size,))
    kind = _make_sharded_class(type(skeleton), [name for name in names if name in alike], mesh, rank)
    model = load_model(folder, dtype=dtype, device=torch.device("cpu"), kind=kind)
    model.__class__ = type(skeleton)
    return model


def divisible_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, after a check that they share no weight with each other or with other modules.

    Raises:
        UnsupportedModel: the architecture does not name its layers, or some of them share a weight.
    """
    layers = layers_of(model)
    if not layers:
        raise UnsupportedModel("This architecture does not name its layers, so it cannot be divided.", param=PARAM)
    inside = [parameter for layer in layers for parameter in layer.parameters()]
    outside = [p for name, p in model.named_parameters(remove_duplicate=False) if not _lies_in(model, name, layers)]
    if len(set(inside)) < len(inside) or set(inside) & set(outside):
        raise UnsupportedModel("Layers of this base share a weight, so it cannot be divided.", param=PARAM)
    return layers


def _lies_in(model: nn.Module, name: str, layers: list[nn.Module]) -> bool:
    parts = name.split(".")
    return any(model.get_submodule(".".join(parts[:n])) in layers for n in range(1, len(parts)))


def _make_sharded_class(kind: type[nn.Module], names: list[str], mesh: DeviceMesh, rank: int) -> type[nn.Module]:
    """A subclass of the architecture whose new models have these weights divided, so that the loader loads parts."""

    def begin(self: Any, *args: Any, **named: Any) -> None:
        kind.__init__(self, *args, **named)
        for name in names:
            path, _, last = name.rpartition(".")
            module = self.get_submodule(path)
            module._parameters[last] = nn.Parameter(
                _empty_shard(module._parameters[last], mesh, rank), requires_grad=False
            )

    # It keeps the name and the module of the original class, because transformers uses the name to find the conversion
    # of weights, and the module to find the model's features.
    return type(kind.__name__, (kind,), {"__init__": begin, "__module__": kind.__module__})


def _empty_shard(whole: torch.Tensor, mesh: DeviceMesh, rank: int) -> DTensor:
    """An empty part of a parameter, with the rows that FSDP gives to this rank."""
    rows, _ = Shard.local_shard_size_and_offset(whole.shape[0], mesh.size(), rank)
    part = torch.empty(rows, *whole.shape[1:], dtype=whole.dtype, device="meta")
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def reset_failed_pass(model: nn.Module) -> None:
    """Reset FSDP's state after a failed pass of a sharded base, because otherwise the next pass would continue it."""
    root = next((module for module in model.modules() if isinstance(module, FSDPModule)), None)
    if root is not None:
        root.reset_iter_state()


# --- what may be read in parts -------------------------------------------------------------------


def _readable_in_parts(skeleton: Any, stored: dict[str, Stored], *, size: int) -> set[str]:
    """Names of the weights that can be loaded in parts: weights stored as they are, and experts stored one by one."""
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    held, found = skeleton.state_dict(), set[str]()
    for name, weight in stored.items():
        target, pattern = rename_source_key(name, renamings, converters, skeleton.base_model_prefix, held)
        if target not in held or not held[target].dim():
            continue
        shape = tuple(held[target].shape)
        if pattern is None and shape == weight.shape:
            found.add(target)
        elif pattern is not None and _stacks(by_pattern[pattern]) and len(shape) == len(weight.shape) + 1:
            # Only if every process gets at least one expert, because the loader cannot stack zero experts.
            found |= {target} if (size - 1) * -(-shape[0] // size) < shape[0] else set()
    return found


def _stacks(converter: WeightConverter) -> bool:
    """Whether it stacks matrices along a new first dimension, and joins stacks along another one."""
    first, *more = converter.operations
    stacks = isinstance(first, MergeModulelist) and first.dim == 0
    return stacks and all(isinstance(one, Concatenate) and one.dim > 0 for one in more)
