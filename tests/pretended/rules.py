"""What CUDA refuses, or what crashes it: tensors on two devices, generators of the host, kernels' demands."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
INDEXING = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index"}
COPYING = {"aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::_local_scalar_dense"}
# Operations that take a number of the host beside tensors of the device, though not element by element.
WITH_SCALARS = {"aten::masked_fill", "aten::masked_fill_", "aten::fill_", "aten::where"}
# torch.use_deterministic_algorithms: without a deterministic form on CUDA (among those that a model could meet).
NOT_DETERMINISTIC = {
    "aten::kthvalue", "aten::put_", "aten::histc", "aten::median.dim", "aten::nll_loss2d_forward", "aten::resize_",
    "aten::_ctc_loss", "aten::_embedding_bag_dense_backward", "aten::_cdist_backward",
}  # fmt: skip
FLASH_DTYPES, FLASH_HEAD, FLASH_STEP = (torch.float16, torch.bfloat16), 256, 8
EFFICIENT_BYTES = 16  # what its pointers and strides are multiples of, on GPUs since Ampere


class Refused(RuntimeError):
    """What a GPU would have answered."""


def check(func: Any, there: Sequence[Tensor], here: Sequence[Tensor], args: Any) -> None:
    """Raise `Refused` where CUDA would not do this.

    Args:
        there: the operation's tensors on the device. `here`: those of the host.
    """
    name = func._schema.name
    if torch.are_deterministic_algorithms_enabled():
        _check_deterministic(name, args)
    if not there or name in COPYING:
        return
    if name.startswith("aten::_fused_adam"):
        if any(step.device.type == "cpu" for step in args[5]):
            raise Refused("fused AdamW reads `step` on the device, and it lies on the host: illegal memory access")
        return
    if name == "torch_attn::_varlen_attn":
        _check_flash(*args[:5])
    if name == "aten::_efficient_attention_forward":
        _check_efficient(*args[:3], *args[4:8])
    indices = tree_leaves(args[1]) if name in INDEXING else []
    apart = [t for t in here if t.dim() and not any(t is index for index in indices)]
    if apart:
        raise Refused(f"{name}: tensors on two devices, {[tuple(t.shape) for t in apart]} on the host")
    element_wise = torch.Tag.pointwise in func.tags or name.startswith("aten::_foreach")
    if here and not (element_wise or name in INDEXING or name in WITH_SCALARS):
        raise Refused(f"{name}: a number of the host in an operation that is not element by element")


def _check_deterministic(name: str, args: Any) -> None:
    sums = name in ("aten::cumsum", "aten::cumsum_") and args[0].is_floating_point()
    if name in NOT_DETERMINISTIC or sums:
        raise Refused(f"{name} does not have a deterministic implementation")


def _check_flash(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor) -> None:
    if q.dtype not in FLASH_DTYPES:
        raise Refused(f"flash attention knows half precision only, not {q.dtype}")
    if q.shape[-1] % FLASH_STEP or q.shape[-1] > FLASH_HEAD:
        raise Refused(f"flash attention takes head sizes of multiples of 8 up to 256, not {q.shape[-1]}")
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        raise Refused("flash attention wants the last dimension in one piece")
    _check_ends(ends_q, ends_k)


def _check_efficient(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int
) -> None:
    if q.dtype not in (*FLASH_DTYPES, torch.float32):
        raise Refused(f"memory-efficient attention does not know {q.dtype}")
    if len(q) != 1 or q.shape[2] != k.shape[2] or q.shape[2] != v.shape[2]:
        raise Refused("memory-efficient attention wants one batch, and as many key heads as heads")
    if any(size * t.element_size() % EFFICIENT_BYTES for t in (q, k, v) for size in (*t.stride()[1:3], t.shape[3])):
        raise Refused(
            f"memory-efficient attention wants multiples of {EFFICIENT_BYTES} bytes, not {q.shape[3]} numbers"
        )
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        raise Refused("memory-efficient attention wants the last dimension in one piece")
    if not (0 < longest_q <= q.shape[1] and 0 < longest_k <= k.shape[1]):
        raise Refused("memory-efficient attention wants to know the longest row")
    _check_ends(ends_q, ends_k)


def _check_ends(*both: Tensor) -> None:
    for ends in both:
        if ends.device.type == "cpu" or ends.dtype != torch.int32 or not ends.is_contiguous():
            raise Refused("attention over rows wants their ends as contiguous int32 on the device")
