"""A base that no device holds whole: torch's FSDP2 on each decoder layer.

Every process keeps 1/n of each layer's weights, and gets a layer whole for as long as it is computed. What stands
outside of the layers (embeddings, last norm, output head) stays whole on every device, and so do adapters.
Each pass is everybody's: a process with nothing to do makes it along (`World.idle`).
"""

from collections.abc import Collection
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, share_comm_ctx
from torch.distributed.tensor import DTensor

from lorainit.errors import TooFewDevices, UnsupportedModel
from lorainit.model.load import skeleton
from lorainit.recompute import layers_of
from lorainit.spec import RunSpec
from lorainit.world import World

PARAM = "training.shard_base"
ROOM = 0.8  # of a device's memory for the base; the rest is for what training adds


def decide(spec: RunSpec, folder: Path, *, world: World, dtype: torch.dtype, device: torch.device) -> str:
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
    size = sum(p.numel() for p in skeleton(folder).parameters()) * dtype.itemsize
    memory = torch.cuda.get_device_properties(device).total_memory
    if not world.anybody(size > ROOM * memory, device):
        return ""
    return f"its {size / 2**30:.1f} GiB are too much for one of them"


def shard(model: nn.Module, device: torch.device, *, world: World, whole: Collection[nn.Parameter] = ()) -> None:
    """Divide `model`, which lies on the CPU, between the devices of all processes, layer by layer.

    Args:
        whole: parameters within layers that every device gets whole.

    Raises:
        UnsupportedModel: the architecture does not name its layers, or some of them share a weight.
    """
    layers = layers_of(model)
    _refuse_indivisible(model, layers)
    mesh = init_device_mesh(device.type, (world.size,))
    for layer in layers:
        kept = set(whole) & set(layer.parameters())
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    # The model around the layers is run in parts, so each of them is a root of its own: one set of streams for all.
    share_comm_ctx([cast(FSDPModule, layer) for layer in layers])
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _refuse_indivisible(model: nn.Module, layers: list[nn.Module]) -> None:
    if not layers:
        raise UnsupportedModel("This architecture does not name its layers, so it cannot be divided.", param=PARAM)
    inside = [parameter for layer in layers for parameter in layer.parameters()]
    outside = [p for name, p in model.named_parameters(remove_duplicate=False) if not _lies_in(model, name, layers)]
    if len(set(inside)) < len(inside) or set(inside) & set(outside):
        raise UnsupportedModel("Layers of this base share a weight, so it cannot be divided.", param=PARAM)


def _lies_in(model: nn.Module, name: str, layers: list[nn.Module]) -> bool:
    parts = name.split(".")
    return any(model.get_submodule(".".join(parts[:n])) in layers for n in range(1, len(parts)))


def local_bytes(model: nn.Module) -> int:
    """Bytes of the model's weights that lie in this process."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(part.numel() * part.element_size() for part in parts)
