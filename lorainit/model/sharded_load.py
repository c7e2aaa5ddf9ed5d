"""A base of which each process reads its own part of the files: the rows of each layer's weights that it will keep.

transformers reads in parts what it is told is divided, names and joins it as ever, and tells what is missing. Left to
it is only what is the same, read in parts or whole: a weight that lies in the files as it is, and experts that lie
there one by one. What it joins or splits along rows is read whole, and divided afterwards (`lorainit.model.shard`).
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
from lorainit.model.source.files import Stored, stored_weights

PARAM = "training.shard_base"


def load_shard(folder: Path, *, dtype: torch.dtype, device: torch.device, rank: int, size: int) -> nn.Module:
    """This process's part of a base, as `load_model` returns the whole one.

    What stands outside of the layers is whole, and on the CPU; the parts are DTensors on `device`.

    Raises:
        UnsupportedModel: as for `load_model`, and where its layers cannot be divided.
    """
    skeleton = build(read_config(folder))
    layers = divisible_layers(skeleton)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    names = [name for name, parameter in skeleton.named_parameters() if id(parameter) in inside]
    alike = _readable_in_parts(skeleton, stored_weights(folder), size=size)
    mesh = init_device_mesh(device.type, (size,))
    kind = _make_sharded_class(type(skeleton), [name for name in names if name in alike], mesh, rank)
    model = load_model(folder, dtype=dtype, device=torch.device("cpu"), kind=kind)
    model.__class__ = type(skeleton)
    return model


def divisible_layers(model: nn.Module) -> list[nn.Module]:
    """The layers, which share no weight with each other or with what stands around them.

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
    """The architecture's class, whose models are made with these weights divided: the loader looks at what is there."""

    def begin(self: Any, *args: Any, **named: Any) -> None:
        kind.__init__(self, *args, **named)
        for name in names:
            path, _, last = name.rpartition(".")
            module = self.get_submodule(path)
            module._parameters[last] = nn.Parameter(
                _empty_shard(module._parameters[last], mesh, rank), requires_grad=False
            )

    # By its own name: transformers looks up by it how weights are converted, and in its module what it can do.
    return type(kind.__name__, (kind,), {"__init__": begin, "__module__": kind.__module__})


def _empty_shard(whole: torch.Tensor, mesh: DeviceMesh, rank: int) -> DTensor:
    """The place of a part: rows as FSDP deals them out."""
    rows, _ = Shard.local_shard_size_and_offset(whole.shape[0], mesh.size(), rank)
    part = torch.empty(rows, *whole.shape[1:], dtype=whole.dtype, device="meta")
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def reset_failed_pass(model: nn.Module) -> None:
    """Of a base that is divided: a pass that failed left its layers in the middle of it; the next one begins anew."""
    root = next((module for module in model.modules() if isinstance(module, FSDPModule)), None)
    if root is not None:
        root.reset_iter_state()


# --- what may be read in parts -------------------------------------------------------------------


def _readable_in_parts(skeleton: Any, stored: dict[str, Stored], *, size: int) -> set[str]:
    """Names of the weights that are the same read in parts: as they are stored, or experts stored one by one."""
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
            # Some of them for everybody: there is nothing to stack where there are none.
            found |= {target} if (size - 1) * -(-shape[0] // size) < shape[0] else set()
    return found


def _stacks(converter: WeightConverter) -> bool:
    """Whether it stacks matrices along a new first dimension, and joins stacks along another one."""
    first, *more = converter.operations
    stacks = isinstance(first, MergeModulelist) and first.dim == 0
    return stacks and all(isinstance(one, Concatenate) and one.dim > 0 for one in more)
