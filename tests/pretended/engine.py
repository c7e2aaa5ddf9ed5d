"""`lorainit` read in such a way that the pretended device is its CUDA: its source is changed while it is imported."""

import re
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

import torch

from tests.pretended import device

CHANGES = [
    (r"torch\.version\.cuda", '"13.0"'),
    (r"torch\.cuda\.", "torch._pretended_cuda."),
    (r'"cuda": ', '"CUDA": '),
    (r'"cuda"', f'"{device.NAME}"'),
    (r"\b(\w+)\.is_cuda", rf'(\1.device.type == "{device.NAME}")'),
    (r"torch\.Generator\((\w[\w.]*)\)", r"torch._pretended_cuda.generator(\1)"),
]
# Where "cuda" is a word of the libraries' errors.
UNCHANGED = ("lorainit.runtime.machine_errors",)
# Tables by kind of device, where the name is a key.
KEYS = {"lorainit.model.passes": [(r'"CUDA": ', f'"{device.NAME}": ')]}


class _Loader(SourceFileLoader):
    def get_data(self, path: str) -> bytes:
        text = super().get_data(path)
        if not path.endswith(".py"):
            raise OSError("no bytecode of another source")
        if self.name in UNCHANGED:
            return text
        for pattern, new in [*CHANGES, *KEYS.get(self.name, [])]:
            text = re.sub(pattern, new, text.decode()).encode()
        return text


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "lorainit":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """From now on `lorainit` takes the device for CUDA; before anything of it is imported."""
    assert not any(name.partition(".")[0] == "lorainit" for name in sys.modules)
    sys.dont_write_bytecode = True
    torch._pretended_cuda = _cuda()  # type: ignore[attr-defined]
    sys.meta_path.insert(0, _Finder())


def _cuda() -> ModuleType:
    """What the engine asks of `torch.cuda`."""
    cuda: Any = ModuleType("pretended_cuda")
    cuda.is_available = lambda: True
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.device_count = lambda: 0  # of generators that the engine saves: there are none
    cuda.max_memory_allocated = lambda: device.memory.peak
    cuda.reset_peak_memory_stats = lambda: setattr(device.memory, "peak", device.memory.held)
    cuda.memory_allocated = cuda.memory_reserved = lambda: device.memory.held
    cuda.mem_get_info = lambda _: (device.memory.limit - device.memory.held, device.memory.limit)
    cuda.get_device_name = lambda: "a pretended GPU"
    cuda.synchronize = lambda _=None: device.wait()
    cuda.empty_cache = device.wait  # memory is only given back when nothing runs
    cuda.generator = device.generator
    return cuda
