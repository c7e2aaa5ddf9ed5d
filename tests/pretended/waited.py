"""`python -m tests.pretended.waited`: how often the host waits in single calls on the pretended GPU, a line of JSON.

What each has to be is written beside it, from torch's documentation and its sources for CUDA.
"""

import json
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from tests.pretended import device, engine

Call = Callable[[Any], object]


def _put(t: Any, value: object) -> None:
    t.x[t.mask] = value


# What is read, bool, or of unknown size: x, x2 are 12 floats, n 12 whole numbers, mask 12 bools, W 4×4.
CALLS: dict[str, tuple[int, Call]] = {
    "item": (1, lambda t: t.x[0].item()),
    "float": (1, lambda t: float(t.x[0])),
    "bool": (1, lambda t: bool(t.x[0] > 1)),
    "tolist": (1, lambda t: t.x.tolist()),
    "a format": (1, lambda t: f"{t.x[0]:.2f}"),
    "repr": (1, lambda t: repr(t.x)),
    "a tensor in a slice": (1, lambda t: t.x[: t.n[3]]),
    "a tensor of one number as an index": (1, lambda t: t.x[t.n[3]]),
    "equal": (1, lambda t: torch.equal(t.x, t.x2)),
    "equal of other shapes": (0, lambda t: torch.equal(t.x, t.W)),
    "allclose": (1, lambda t: torch.allclose(t.x, t.x2)),
    "in": (1, lambda t: 3.0 in t.x),
    # copies
    "cpu": (1, lambda t: t.x.cpu()),
    "to the host behind its back": (0, lambda t: t.x.to("cpu", non_blocking=True)),
    "to pageable memory, non_blocking": (1, lambda t: t.host.copy_(t.x, non_blocking=True)),
    "to the device": (1, lambda t: t.host.to(t.x.device)),
    "pageable memory to the device, non_blocking": (1, lambda t: t.host.to(t.x.device, non_blocking=True)),
    "made of a list": (1, lambda t: torch.tensor([1.0, 2.0], device=t.x.device)),
    "made of a number": (0, lambda t: torch.full((2,), 1.0, device=t.x.device)),
    "copied on the device": (0, lambda t: t.x.clone().copy_(t.x2)),
    "another dtype": (0, lambda t: t.x.to(torch.bfloat16)),
    # indices
    "nonzero": (1, lambda t: t.mask.nonzero()),
    "argwhere": (1, lambda t: torch.argwhere(t.mask)),
    "where of a condition": (1, lambda t: torch.where(t.mask)),
    "where of three": (0, lambda t: torch.where(t.mask, t.x, t.x2)),
    "count_nonzero": (0, lambda t: t.mask.count_nonzero()),
    "masked_select": (1, lambda t: t.x.masked_select(t.mask)),
    "a mask as an index": (1, lambda t: t.x[t.mask]),
    "whole numbers as an index": (0, lambda t: t.x[t.n]),
    "an index of the host": (1, lambda t: t.x[torch.tensor([1, 2])]),
    "values where a mask is": (1, lambda t: _put(t, t.x2[:8])),
    "a number where a mask is": (0, lambda t: _put(t, 0.0)),
    "a number of the device where a mask is": (1, lambda t: _put(t, t.x2[0])),
    "index_put_ by a mask": (1, lambda t: t.x.index_put_((t.mask,), t.x2[:8], accumulate=True)),
    "index_put_ by whole numbers": (0, lambda t: t.x.index_put_((t.n,), t.x2, accumulate=True)),
    "masked_fill by a number": (0, lambda t: t.x.masked_fill(t.mask, 0.0)),
    "masked_fill by a number of the device": (1, lambda t: t.x.masked_fill(t.mask, t.x2[0])),
    "masked_scatter": (0, lambda t: t.x.masked_scatter(t.mask, t.x2)),
    "scatter": (0, lambda t: t.x.scatter(0, t.n, t.x2)),
    "index_select": (0, lambda t: t.x.index_select(0, t.n)),
    "index_add": (0, lambda t: t.x.index_add(0, t.n, t.x2)),
    # sizes that hang on numbers
    "unique": (1, lambda t: torch.unique(t.x)),
    "unique of rows": (1, lambda t: torch.unique(t.W, dim=0)),
    "unique_consecutive": (1, lambda t: torch.unique_consecutive(t.x)),
    "bincount": (2, lambda t: torch.bincount(t.n)),
    "histc without a range": (2, lambda t: torch.histc(t.x)),
    "histc with a range": (0, lambda t: torch.histc(t.x, min=0, max=12)),
    "isin of few": (0, lambda t: torch.isin(t.x, t.x2[:3])),
    "isin of many": (2, lambda t: torch.isin(t.x, t.many)),
    "repeat_interleave": (1, lambda t: torch.repeat_interleave(t.x, t.n)),
    "repeat_interleave to a size": (0, lambda t: torch.repeat_interleave(t.x, t.n, output_size=66)),
    "repeat_interleave by a number": (0, lambda t: torch.repeat_interleave(t.x, 2)),
    "one_hot": (1, lambda t: torch.nn.functional.one_hot(t.n)),
    "one_hot to a size": (0, lambda t: torch.nn.functional.one_hot(t.n, 12)),
    "sort": (0, lambda t: t.x.sort()),
    "topk": (0, lambda t: t.x.topk(3)),
    "searchsorted": (0, lambda t: torch.searchsorted(t.x, t.x2)),
    "searchsorted in an order": (2, lambda t: torch.searchsorted(t.x, t.x2, sorter=t.n)),
    # chance
    "multinomial": (2, lambda t: t.x2.multinomial(3)),
    "multinomial with replacement": (0, lambda t: t.x2.multinomial(3, replacement=True)),
    "normal by a tensor's deviation": (1, lambda t: torch.normal(t.x, t.x2)),
    "bernoulli": (0, lambda t: torch.bernoulli(t.x.clamp(0, 1))),
    "randperm": (0, lambda t: torch.randperm(12, device=t.x.device)),
    "a generator": (0, lambda t: torch._pretended_cuda.generator(t.x.device).manual_seed(1)),  # type: ignore[attr-defined]
    # linear algebra: what the solver says of errors is read
    "cholesky": (1, lambda t: torch.linalg.cholesky(t.W)),
    "cholesky_ex": (0, lambda t: torch.linalg.cholesky_ex(t.W)),
    "cholesky_ex that checks": (1, lambda t: torch.linalg.cholesky_ex(t.W, check_errors=True)),
    "the older cholesky": (1, lambda t: torch.cholesky(t.W)),
    "cholesky_inverse": (1, lambda t: torch.cholesky_inverse(t.W)),
    "cholesky_solve": (0, lambda t: torch.cholesky_solve(t.W, t.W)),
    "inv": (1, lambda t: torch.linalg.inv(t.W)),
    "solve": (1, lambda t: torch.linalg.solve(t.W, t.W)),
    "solve_ex": (0, lambda t: torch.linalg.solve_ex(t.W, t.W)),
    "solve_triangular": (0, lambda t: torch.linalg.solve_triangular(t.W, t.W, upper=True)),
    "lu_factor": (1, lambda t: torch.linalg.lu_factor(t.W)),
    "lstsq": (1, lambda t: torch.linalg.lstsq(t.W, t.W)),
    "svd": (2, lambda t: torch.linalg.svd(t.W)),
    "svdvals": (2, lambda t: torch.linalg.svdvals(t.W)),
    "eigh": (1, lambda t: torch.linalg.eigh(t.W)),
    "eigvalsh": (1, lambda t: torch.linalg.eigvalsh(t.W)),
    "eig": (1, lambda t: torch.linalg.eig(t.W)),
    "qr": (0, lambda t: torch.linalg.qr(t.W)),
    "matrix_exp": (1, lambda t: torch.linalg.matrix_exp(t.W)),
    # of torch.cuda
    "synchronize": (1, lambda t: torch._pretended_cuda.synchronize()),  # type: ignore[attr-defined]
    "empty_cache": (1, lambda t: torch._pretended_cuda.empty_cache()),  # type: ignore[attr-defined]
    "memory_allocated": (0, lambda t: torch._pretended_cuda.memory_allocated()),  # type: ignore[attr-defined]
    "mem_get_info": (0, lambda t: torch._pretended_cuda.mem_get_info(t.x.device)),  # type: ignore[attr-defined]
}


def counted() -> dict[str, int | str]:
    """Each call's waits, or how it failed."""
    found: dict[str, int | str] = {}
    with device.switched_on() as tally:
        for name, (_, call) in CALLS.items():
            tensors = _tensors()
            before = tally.waits
            try:
                call(tensors)
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"[:300]
            else:
                found[name] = tally.waits - before
    return found


def _tensors() -> Any:
    there = torch.device(device.NAME, 0)
    x = torch.arange(12.0)
    W = 4 * torch.eye(4) + torch.ones(4, 4)
    host = SimpleNamespace(x=x, x2=x + 1, n=torch.arange(12), mask=x > 3, W=W, many=torch.arange(100.0))
    return SimpleNamespace(**{name: t.to(there) for name, t in vars(host).items()}, host=x.clone())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    device.install()
    engine.install()
    print(json.dumps(counted()))
