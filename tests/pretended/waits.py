"""How often the host waits for a GPU in one operation, as torch's implementations for CUDA have it.

Where the size of a result, an error or a choice hangs on numbers of the device, the host has to read them. What
`torch.cuda.set_sync_debug_mode` tells is in here, and copies from pageable memory, which it does not tell.
Operations that torch puts together from others (`where` of a condition alone, `x in tensor`) need no rule:
their parts arrive one by one.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Named = dict[str, Any]

# Whatever is asked. Of `linalg`: those that look at what the solver says of errors inside.
ALWAYS = {
    "aten::_local_scalar_dense": 1, "aten::nonzero": 1, "aten::masked_select": 1, "aten::_unique": 1,
    "aten::_unique2": 1, "aten::unique_dim": 1, "aten::unique_consecutive": 1, "aten::unique_dim_consecutive": 1,
    "aten::allclose": 1, "aten::_linalg_check_errors": 1, "aten::_linalg_eigh": 1, "aten::linalg_eig": 1,
    "aten::_linalg_eigvals": 1,
    "aten::linalg_lstsq": 1, "aten::linalg_matrix_exp": 1, "aten::cholesky": 1, "aten::cholesky_inverse": 1,
    "aten::_linalg_svd": 2,  # the solver that is tried first may not converge
    "aten::_to_sparse": 1, "aten::_coalesce": 1, "aten::embedding_renorm_": 1,
}  # fmt: skip


def of(func: Any, args: Any, kwargs: Any) -> int:
    """How often, for this call with the tensors as the caller has them; of copies `of_copy` knows."""
    name = func._schema.name
    if name in ALWAYS:
        return ALWAYS[name]
    if name in BY_CALL:
        return BY_CALL[name](_named(func, args, kwargs))
    return int("linalg" in name and bool(_named(func, args, kwargs).get("check_errors")))


def of_copy(*, source: Tensor, target: Tensor | None, blocking: bool, comes: bool, goes: bool) -> int:
    """Of a copy from the device (`comes`) or to it (`goes`), or on one side. `target`: None if torch makes it."""
    if comes == goes:
        return 0
    # Only page-locked memory is copied behind the host's back. What torch itself makes for such a copy is that.
    free = target is None or target.is_pinned() if comes else source.is_pinned()
    return int(blocking or not free)


def bytes_of_indices(func: Any, args: Any, kwargs: Any) -> int:
    """What indices that lie on the host bring to the device."""
    if BY_CALL.get(func._schema.name) is not _indexing:
        return 0
    return sum(_bytes(i) for i in _indices(_named(func, args, kwargs)) if i.device.type == "cpu")


def _named(func: Any, args: Any, kwargs: Any) -> Named:
    return {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}


# --- what hangs on the call ------------------------------------------------------------------------


def _indexing(named: Named) -> int:
    """A mask becomes indices; indices of the host are brought over, one after the other."""
    if _fills(named):
        return 0
    found = 0
    for index in _indices(named):
        mask, host = index.dtype in (torch.bool, torch.uint8), index.device.type == "cpu"
        found += (index.dim() if mask else 1) if host else mask
    return found


def _fills(named: Named) -> bool:
    """`x[mask] = 0.0` needs no indices: it is a `masked_fill_`."""
    value, (first, *more) = named.get("values"), list(_indices(named)) or [None]
    return (
        value is not None and value.numel() == 1 and value.device.type == "cpu" and not named.get("accumulate")
        and first is not None and not more and first.dtype == torch.bool and first.device.type != "cpu"
    )  # fmt: skip


def _indices(named: Named) -> Iterator[Tensor]:
    return (index for index in named["indices"] if isinstance(index, Tensor))


def _bytes(index: Tensor) -> int:
    if index.dtype in (torch.bool, torch.uint8):  # its indices, in int64
        return int(index.count_nonzero()) * index.dim() * 8
    return index.numel() * index.element_size()


def _equal(named: Named) -> int:
    one, two = named["self"], named["other"]
    return int(one.shape == two.shape and one.numel() > 0)


def _filled(named: Named) -> int:
    """The value is read, so that it can be an argument of the kernel."""
    value = named["value"]
    return int(isinstance(value, Tensor) and value.device.type != "cpu")


def _looked_up(named: Named) -> int:
    """By sorting both, for which they are made unique, where there are many to compare with."""
    one, two = named.get("elements"), named.get("test_elements")
    if not (isinstance(one, Tensor) and isinstance(two, Tensor)) or named.get("assume_unique"):
        return 0
    return 2 * (two.numel() >= 10 * one.numel() ** 0.145)


BY_CALL: dict[str, Callable[[Named], int]] = {
    **{f"aten::{name}": _indexing for name in ("index", "_unsafe_index", "index_put", "index_put_")},
    **{f"aten::{name}": _indexing for name in ("_index_put_impl_", "_unsafe_index_put")},
    "aten::equal": _equal,
    "aten::masked_fill": _filled,
    "aten::masked_fill_": _filled,
    "aten::isin": _looked_up,
    # The least and the largest number.
    "aten::bincount": lambda named: 2 * bool(named["self"].numel()),
    "aten::histc": lambda named: 2 * (named.get("min", 0) == named.get("max", 0)),
    "aten::searchsorted": lambda named: 2 * (named.get("sorter") is not None),
    # Are these probabilities, and is one above zero?
    "aten::multinomial": lambda named: 2 * (not named.get("replacement") or named["num_samples"] == 1),
    "aten::normal": lambda named: int(isinstance(named.get("std"), Tensor)),
    "aten::repeat_interleave": lambda named: int(named.get("output_size") is None),
}
