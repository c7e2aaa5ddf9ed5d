"""Regional compilation: the element-wise parts of every decoder layer, as one kernel each (`torch.compile`).

Layers of one kind share their kernels, so a model of thirty layers takes no longer to compile than one of two.
Adapted layers, attention and experts are not compiled, because they are functions of our own. Measured on two CPU cores
with SmolLM2 in bf16: 25 s for a first compilation, 9 s with kernels from the cache, 8-10 % less time per step.
"""

import os
import shutil
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from lorainit.model.forward import attention
from lorainit.model.forward.recompute import layers_of
from lorainit.model.layers import experts
from lorainit.model.layers.group import GroupedLinear
from lorainit.model.layers.layer import LoRALinear

# Compile from so many operations of a run on a CPU. At 4e11 operations a second, 1e14 take 250 s. Saving a tenth of
# that pays for a compilation of 25 s, and the limit is twice as high to be safe.
PAYS_FROM = 2e14


def is_worth_compiling(model: nn.Module, *, tokens: int) -> tuple[bool, str]:
    """Whether a run over so many tokens saves more time than compiling costs, and the reason.

    It depends on the amount of work and not on measured time, because a resumed run must make the same choice again.
    float32 is never compiled, because there a row's bits must not depend on its place in a batch, and vectorized
    kernels round the last few numbers of a tensor differently.
    """
    weight = next(model.parameters())
    operations = 4 * tokens * sum(p.numel() for p in model.parameters())
    if weight.dtype.itemsize > 2:
        return False, "float32 keeps every row's bits independent of its neighbours"
    if weight.is_cuda:
        return False, "not measured on a GPU: ask for it with compile = true"
    if operations < PAYS_FROM:
        return False, f"the run is too short to get its compilation back ({operations:.1e} operations)"
    if not _has_compiler():
        return False, "this machine has no C++ compiler"
    return True, f"{operations:.1e} operations get a compilation back"


def compile_layers(model: nn.Module) -> None:
    """Compile the layers at the next pass; they stay compiled until `undo`."""
    from torch._inductor import config  # imported here, because loading the compiler takes seconds

    config.compile_threads = 1  # otherwise the compiler starts processes, which could outlive ours
    for kind in (LoRALinear, GroupedLinear):
        _keep_out(kind)
    for module in experts.find_runners(model):
        module.forward = torch.compiler.disable(module.forward)
    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.attend))
    for layer in layers_of(model):
        layer.compile(dynamic=True)


def undo(model: nn.Module) -> None:
    """Run the layers uncompiled again."""
    for layer in layers_of(model):
        layer._compiled_call_impl = None


def _keep_out(kind: Any) -> None:
    if not hasattr(kind.forward, "_torchdynamo_disable"):
        kind.forward = torch.compiler.disable(kind.forward)


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
