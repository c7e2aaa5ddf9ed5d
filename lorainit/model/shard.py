"""Divides a base that does not fit on one device, with torch's FSDP2 on each decoder layer.

Every process keeps 1/n of each layer's weights. A layer is gathered while it is computed, and the next one is fetched
meanwhile, so at most two layers are whole at a time. Everything outside of the layers (embeddings, last norm, output
head) is whole on every device, and so are adapters.
All processes make every pass together, because each has a part of the weights. A process without rows of its own still
takes part (`World.count_idle_passes`).
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lorainit.config.errors import TooFewDevices
from lorainit.config.spec import RunSpec
from lorainit.model.load import build_skeleton
from lorainit.model.sharded_load import PARAM, divisible_layers
from lorainit.runtime.distributed.world import World

MAX_BASE_SHARE = 0.8  # the share of a device's memory that the base may take; training needs the rest


def explain_sharding(spec: RunSpec, folder: Path, *, world: World, dtype: torch.dtype, device: torch.device) -> str:
    """Why the base must be divided between the processes; "" if each holds it whole.

    Raises:
        TooFewDevices: the spec asks for it, but there is only one process.
    """
    wanted = spec.training.shard_base
    if wanted is True:
        if world.size == 1:
            raise TooFewDevices("shard_base divides the base between processes, and this one is alone.", param=PARAM)
        return "it was asked for"
    if wanted is False or world.size == 1 or device.type != "cuda" or spec.lora.quantization:
        return ""
    size = sum(p.numel() for p in build_skeleton(folder).parameters()) * dtype.itemsize
    memory = torch.cuda.get_device_properties(device).total_memory
    if not world.any_rank(size > MAX_BASE_SHARE * memory, device):
        return ""
    return f"its {size / 2**30:.1f} GiB are too much for one of them"


def shard(model: nn.Module, device: torch.device, *, world: World, whole: Collection[nn.Parameter] = ()) -> None:
    """Divide `model` between the devices of all processes, layer by layer.

    Args:
        model: whole and on the CPU, or loaded in parts (`lorainit.model.sharded_load`).
        whole: parameters inside layers that every device keeps whole.

    Raises:
        UnsupportedModel: the architecture does not name its layers, or some of them share a weight.
    """
    layers = divisible_layers(model)
    mesh = init_device_mesh(device.type, (world.size,))
    with _parts_aside(layers):
        for layer in layers:
            kept = set(whole) & set(layer.parameters())
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        _make_root(_around(model, layers), mesh)
    # Layers run in this order, so each fetches the next one early. In the backward pass FSDP does that by itself.
    for one, following in pairwise(cast(list[FSDPModule], layers)):
        one.set_modules_to_forward_prefetch([following])
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


@contextmanager
def _parts_aside(layers: list[nn.Module]) -> Iterator[None]:
    """Replace parameters that were loaded in parts by empty ones inside, because FSDP expects whole parameters.

    The parts are put back at the end. FSDP finds them, because it looks up its parameters again when it first runs.
    """
    modules = [module for layer in layers for module in layer.modules()]
    tables = [(module._parameters, name, part) for module in modules for name, part in module._parameters.items()]
    held = [(own, name, part) for own, name, part in tables if part is not None and isinstance(part, DTensor)]
    for own, name, part in held:
        hollow = torch.empty(part.shape, dtype=part.dtype, device="meta")
        own[name] = nn.Parameter(hollow, requires_grad=False)
    yield
    for own, name, part in held:
        own[name] = part


def _around(model: nn.Module, layers: list[nn.Module]) -> nn.Module:
    """The smallest module that runs all layers."""
    every = [module for module in model.modules() if set(layers) <= set(module.modules()) - {module}]
    return next(module for module in reversed(every) if not isinstance(module, nn.ModuleList | nn.ModuleDict))


def _make_root(around: nn.Module, mesh: DeviceMesh) -> None:
    """Make one FSDP root for all layers. Otherwise each layer would be a root, which waits for all earlier work before
    it is fetched."""
    kind = type(around)
    fully_shard(around, mesh=mesh, ignored_params=_unwrapped(around))
    # FSDP has replaced the class by a new one. transformers looks up a model's features in the module of its class, so
    # the module's name is set back.
    type(around).__module__ = kind.__module__


def _unwrapped(around: nn.Module) -> set[nn.Parameter]:
    """The parameters outside of the layers, which every device keeps whole."""
    return {parameter for parameter in around.parameters() if not isinstance(parameter, DTensor)}


def local_bytes(model: nn.Module) -> int:
    """Bytes of the model's weights in this process."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(part.numel() * part.element_size() for part in parts)
