"""Runs a model in float64 with its own weights, to measure what an adapter does without the run's rounding.

Weights are converted to float64 only while their decoder layer runs, so that no second copy of the base is in memory.
The conversion is exact, because every bf16 and float32 number is also a float64 number. A few architectures cannot
compute in float64, because their code names float32; they are run in float32.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.model.forward import attention
from lorainit.model.layers.decoder_layers import listed_layers
from lorainit.model.layers.layer import LoRALinear
from lorainit.model.layers.quantize import is_quantized
from lorainit.model.layers.weight import weight_of

TRIED = 8  # tokens of the trial, which shows only whether the model runs


@torch.no_grad()
def find_widest_dtype(model: nn.Module, text: Tensor) -> torch.dtype | None:
    """float64 if the model runs in it on this device, else float32, else None; found out with the first tokens of
    `text`."""
    ids = text[None, :TRIED].to(next(model.parameters()).device)
    for dtype in (torch.float64, torch.float32):
        with suppress(RuntimeError), compute_in(model, dtype):  # the code mixes formats, or memory is too small
            model(input_ids=ids)
            return dtype
    return None


@contextmanager
def compute_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let `model` compute in `dtype`, uncompiled and with transformers' own attention and experts.

    Embeddings are looked up in their own format and the result is converted, because they are the largest weights and
    a lookup does not round. When the context ends, the model is the same as before, bit for bit.
    """
    with ExitStack() as stack:
        stack.enter_context(_stock_kernels(model))
        stack.enter_context(_uncompiled(model))
        layers = listed_layers(model)
        inside = {id(module) for layer in layers for module in layer.modules()}
        for layer in layers:
            stack.enter_context(_widened_while_it_runs(layer, dtype, recurse=True))
        for module in model.modules():
            if id(module) in inside:
                continue
            if isinstance(module, LoRALinear):  # with all its parts, because it reads its base's weight without a call
                inside |= {id(part) for part in module.modules()}
                stack.enter_context(_widened_while_it_runs(module, dtype, recurse=True))
            elif isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(partial(_widen_output, dtype)).remove)
            elif next(module.parameters(recurse=False), None) is not None:
                stack.enter_context(_widened_while_it_runs(module, dtype, recurse=False))
        yield


@contextmanager
def widen_weights(module: nn.Module, dtype: torch.dtype, *, recurse: bool = True) -> Iterator[None]:
    """Convert the module's floating-point weights to `dtype` while the context lasts.

    Layers in four bits and sharded layers are replaced by plain linear layers with the same weight, because their own
    tensors cannot be converted.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for owner in list(module.modules()) if recurse else [module]:
            tables: list[dict[str, Any]] = [owner._parameters, owner._buffers]
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None and tensor.is_floating_point() and not _is_divided(tensor):
                        before.append((table, name, tensor))
            for name, child in owner._modules.items() if recurse else ():
                # Only modules without children are replaced, because an adapted layer also shows its base's weight as
                # its own.
                if child is None or next(child.children(), None) is not None:
                    continue
                if is_quantized(child) or _is_divided(getattr(child, "weight", None)):
                    before.append((owner._modules, name, child))
        for table, name, held in before:
            table[name] = make_plain_linear(held, dtype) if isinstance(held, nn.Module) else _wide(held, dtype)
        yield
    finally:
        for table, name, held in before:
            table[name] = held


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    wide = tensor.detach().to(dtype)
    return nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide


def make_plain_linear(module: Any, dtype: torch.dtype) -> nn.Linear:
    """A plain linear layer with a module's weight and bias in `dtype`, in whatever form the module stores them."""
    W = weight_of(module).detach().to(dtype)
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(W, requires_grad=False)
    if module.bias is not None:
        bias = module.bias.full_tensor() if _is_divided(module.bias) else module.bias
        linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear


def _is_divided(tensor: object) -> bool:
    return hasattr(tensor, "full_tensor")


@contextmanager
def _widened_while_it_runs(module: nn.Module, dtype: torch.dtype, *, recurse: bool) -> Iterator[None]:
    running = ExitStack()

    def enter(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        running.enter_context(widen_weights(module, dtype, recurse=recurse))
        # For single modules the inputs are converted too: Mamba converts the head's input to the format that the head
        # had before this hook.
        return inputs if recurse else tuple(_widen(x, dtype) for x in inputs)

    def leave(*_: Any) -> None:
        running.close()

    hooks = module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        running.close()
        for hook in hooks:
            hook.remove()


def _widen_output(dtype: torch.dtype, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.to(dtype)


def _widen(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


@contextmanager
def _stock_kernels(model: Any) -> Iterator[None]:
    """Use transformers' own attention and experts, because the fast kernels support only the formats of a run.

    That our attention gives the same results was checked when it was installed (`lorainit.model.layout`).
    """
    with ExitStack() as stack:
        if model.config._attn_implementation == attention.NAME:
            stack.callback(model.set_attn_implementation, attention.NAME)
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        if model._can_set_experts_implementation():
            before = model.get_experts_implementation()
            stack.callback(model.set_experts_implementation, before)
            model.set_experts_implementation(dict.fromkeys(before, "eager"))
        yield


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl}
    try:
        for module in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
