"""A base that no device holds whole: torch's FSDP2 on each decoder layer.

Every process keeps 1/n of each layer's weights, and gets a layer whole for as long as it is computed, while the next
one is on its way: two layers at most are whole. What stands outside of the layers (embeddings, last norm, output head)
stays whole on every device, and so do adapters.
Each pass is everybody's: a process with nothing to do makes it along (`World.idle`).
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

ROOM = 0.8  # of a device's memory for the base; the rest is for what training adds


def explain_sharding(spec: RunSpec, folder: Path, *, world: World, dtype: torch.dtype, device: torch.device) -> str:
    """Why the base is to be divided between the processes, or "" where each holds it whole.

    Raises:
        TooFewDevices: it is asked for, and this process is alone.
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
    if not world.any_rank(size > ROOM * memory, device):
        return ""
    return f"its {size / 2**30:.1f} GiB are too much for one of them"


def shard(model: nn.Module, device: torch.device, *, world: World, whole: Collection[nn.Parameter] = ()) -> None:
    """Divide `model` between the devices of all processes, layer by layer.

    Args:
        model: on the CPU, or read by this process in parts (`lorainit.model.sharded_load`).
        whole: parameters within layers that every device gets whole.

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
    # In this order they run; backward, FSDP asks for them in the reverse of the order in which they ran.
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
    """FSDP divides what is whole: parts that were read as such give way to weights without numbers, and come back.

    FSDP looks for its parameters again when it first runs.
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
    """One root for all layers: a layer that is one by itself waits for all that was computed before it is sent for."""
    kind = type(around)
    fully_shard(around, mesh=mesh, ignored_params=_unwrapped(around))
    # transformers reads what a model can do in the file of its class, and FSDP has made a class of its own for it.
    type(around).__module__ = kind.__module__


def _unwrapped(around: nn.Module) -> set[nn.Parameter]:
    """What stands beside the layers stays as it is: every device has it whole."""
    return {parameter for parameter in around.parameters() if not isinstance(parameter, DTensor)}


def local_bytes(model: nn.Module) -> int:
    """Bytes of the model's weights that lie in this process."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(part.numel() * part.element_size() for part in parts)
