"""Computes a model in float64 from the weights as they are, to see what an adapter does without the run's rounding.

Weights become float64 for as long as their decoder layer runs, so no second copy of the base lies in memory.
bf16 and float32 numbers are float64 numbers too, so nothing is rounded on the way. Few architectures cannot
compute in float64, because their code names float32: they do the same in float32. Knows nothing of files.
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

TRIED = 8  # tokens


@torch.no_grad()
def find_widest_dtype(model: nn.Module, text: Tensor) -> torch.dtype | None:
    """float64 where this architecture and this device can compute in it, else float32, else None: `text` is tried."""
    ids = text[None, :TRIED].to(next(model.parameters()).device)
    for dtype in (torch.float64, torch.float32):
        with suppress(RuntimeError), compute_in(model, dtype):  # mixed formats, or memory
            model(input_ids=ids)
            return dtype
    return None


@contextmanager
def compute_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """`model` computes in `dtype`, uncompiled and with the attention and experts that transformers gives it.

    Embeddings are looked up as they are and widened afterwards: they are the largest weights, and nothing is
    computed with them. The model is as it was when the context ends, bit for bit.
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
            if isinstance(module, LoRALinear):  # it reads its base's weight and does not call it
                inside |= {id(part) for part in module.modules()}
                stack.enter_context(_widened_while_it_runs(module, dtype, recurse=True))
            elif isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(partial(_widen_output, dtype)).remove)
            elif next(module.parameters(recurse=False), None) is not None:
                stack.enter_context(_widened_while_it_runs(module, dtype, recurse=False))
        yield


@contextmanager
def widen_weights(module: nn.Module, dtype: torch.dtype, *, recurse: bool = True) -> Iterator[None]:
    """The module's floating-point weights in `dtype`, for as long as the context lasts.

    Layers in four bits, and those that devices share, are replaced by plain ones with the weight that they stand for.
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
                # An adapted layer shows its base's weight as its own: only what has no parts is replaced.
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
    """A linear layer with a module's weight and bias in `dtype`, whatever form that module holds them in."""
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
        # Mamba asks the head for its format before it calls it.
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
    """transformers' own attention and experts: fast ones know the run's formats only.

    That our attention is theirs is shown when it is installed.
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
