"""One of several processes that read bases in parts: `python -m tests.lorainit.parts RANK SIZE FOLDER`.

FOLDER/bases.json is {name: folder}. What each process found of each base is in FOLDER/RANK.json: bytes that were read
and are held, most of memory that was taken meanwhile, whether the parts together are the whole base, and in which
order a pass gathered and computed its layers.
"""

import json
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaForCausalLM, modeling_utils

from lorainit.config.errors import UnsupportedModel
from lorainit.model.load import load_model
from lorainit.model.shard import local_bytes, shard
from lorainit.model.sharded_load import divisible_layers, load_shard
from lorainit.runtime.distributed.launch import end_process
from lorainit.runtime.distributed.world import World

CPU = torch.device("cpu")
DTYPE = torch.float32


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting, patience = f"file://{folder}/meeting", timedelta(minutes=4)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=patience)
    read = counted()
    bases = json.loads((folder / "bases.json").read_text())
    found = {name: examined(Path(base), read, World(rank, size)) for name, base in bases.items()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def examined(base: Path, read: list[int], world: World) -> dict[str, Any]:
    read.clear()
    try:
        with Peak() as peak:
            model = load_shard(base, dtype=DTYPE, device=CPU, rank=world.rank, size=world.size)
    except UnsupportedModel as refused:
        return {"refused": refused.message}
    held, of_part, most = local_bytes(model), sum(read), peak.most
    whole = load_model(base, dtype=DTYPE, device=CPU)
    pairs = zip(model.named_parameters(), whole.named_parameters(), strict=True)
    other = [name for (name, part), (same, one) in pairs if name != same or not torch.equal(together(part), one)]
    layers = sum(p.nbytes for layer in divisible_layers(whole) for p in layer.parameters())
    sizes = {"read": of_part, "held": held, "most": most, "layers": layers, "whole": local_bytes(whole)}
    del whole
    shard(model, CPU, world=world)
    # Hooks on what some architectures change in place are refused by torch.
    return {**sizes, "other": other, "trace": trace(model) if isinstance(model, LlamaForCausalLM) else None}


def together(part: Any) -> torch.Tensor:
    return part.full_tensor() if hasattr(part, "full_tensor") else part


# --- what is counted -----------------------------------------------------------------------------


def counted() -> list[int]:
    """From now on, the bytes of each piece of a file that transformers asks for."""
    read: list[int] = []
    opened = modeling_utils.safe_open

    class Piece:
        def __init__(self, piece: Any) -> None:
            self.piece = piece

        def __getitem__(self, where: Any) -> torch.Tensor:
            tensor = self.piece[where]
            read.append(tensor.nbytes)
            return tensor

        def __getattr__(self, name: str) -> Any:
            return getattr(self.piece, name)

    class File:
        def __init__(self, *args: Any, **named: Any) -> None:
            self.file = opened(*args, **named)

        def get_slice(self, name: str) -> Piece:
            return Piece(self.file.get_slice(name))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

    modeling_utils.safe_open = File
    return read


class Peak:
    """The most memory of its own, in bytes, that this process took beyond what it had; mapped files do not count."""

    def __enter__(self) -> "Peak":
        self.before, self.most, self.over = self.own(), 0, threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.watcher.join()

    def watch(self) -> None:
        while not self.over.wait(0.002):
            self.most = max(self.most, self.own() - self.before)
        self.most = max(self.most, self.own() - self.before)

    @staticmethod
    def own() -> int:
        (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("RssAnon")]
        return int(line.split()[1]) * 1024


def trace(model: nn.Module) -> list[str]:
    """What a pass, forward and backward, did: "gather 2", "compute 1" at its beginning, "done 1"."""
    found: list[str] = []
    for number, layer in enumerate(divisible_layers(model)):
        assert isinstance(layer, FSDPModule)
        layer.set_custom_all_gather(Gather(number, found))
        parts = [child for child in layer.children() if next(child.parameters(), None) is not None]
        for part in parts:
            part.register_forward_pre_hook(lambda *_, n=number: found.append(f"compute {n}"))
            part.register_forward_hook(lambda *_, n=number: found.append(f"done {n}"))
            part.register_full_backward_pre_hook(lambda *_, n=number: found.append(f"compute {n}"))
            part.register_full_backward_hook(lambda *_, n=number: found.append(f"done {n}"))
    embeddings: Any = model.get_input_embeddings()
    embeddings.weight.requires_grad_()
    output = model(input_ids=torch.arange(1, 9)[None], use_cache=False).logits
    found.append("back")
    output.float().square().mean().backward()
    return found


class Gather:
    """FSDP's own way to get a layer from all processes, which tells when it is asked."""

    def __init__(self, number: int, found: list[str]) -> None:
        self.number, self.found = number, found

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool) -> Any:
        self.found.append(f"gather {self.number}")
        return distributed.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    end_process(0)
