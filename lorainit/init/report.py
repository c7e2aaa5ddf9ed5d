"""Numbers about a start: for each layer, and for the whole model on training rows.

Most of them use only r×r and r×n products, so that no second matrix of a weight's size is needed in memory.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.config.errors import InitFailed
from lorainit.config.spec import Lora
from lorainit.data.batches import Batch
from lorainit.init.evidence import Evidence
from lorainit.init.methods import SUMMARIES
from lorainit.init.norms import norm
from lorainit.model.forward.loss import BatchResult, row_losses, run_batch, sum_losses
from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import adapted_layers, disable_adapters
from lorainit.model.layers.weight import weight_of
from lorainit.runtime.devices import peak_memory_bytes
from lorainit.runtime.retry import retry_until_it_fits

# How far the loss of a function-preserving start may differ from the base's, in nats; relative for losses above 1. In
# bfloat16 rounding alone moves the loss more, hence its larger limit.
LOSS_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
# Facts that are the same for all layers. Every layer's entry has them, and the summary takes them from the first.
SHARED = ("gamma", "line_search", "preheat")


# --- one layer ---------------------------------------------------------------------------------


def describe_layer(
    name: str,
    W: Tensor,
    factors: Factors,
    evidence: Evidence,
    *,
    s: float,
    lora: Lora,
    magnitude: Tensor | None = None,
) -> dict[str, Any]:
    """The entry of one layer in `init_report.json`.

    `captured_energy` (methods that take part of W): share of ‖W‖² in the space of B's columns and A's rows.
    `gradient_alignment` (methods with a gradient): share of ‖G‖² that a first step of A and B can reach.
    `first_order_change` (displaced starts): <G, s·B·A>, the loss change of the start to first order.
    `first_step_slope`: loss change of the first AdamW step per unit of learning rate, to first order.
    `magnitude_norm` (DoRA): ‖m‖, which is ‖W + s·B·A‖ at the start.
    `start`: "kaiming" for experts that got too few tokens for the method.
    """
    A, B = factors.A, factors.B
    found: dict[str, Any] = {
        "name": name,
        "out": W.shape[0],
        "in": W.shape[1],
        "rank": A.shape[0],
        "scale": s,
        "weight_norm": norm(W),
        "product_norm": s * product_norm(A, B),
    }
    if magnitude is not None:
        magnitude = magnitude.detach()
        found["magnitude_norm"] = norm(magnitude)
    if lora.method.takes_part_of_weight and not evidence.starved:
        found["captured_energy"] = _captured_energy(W, factors, whole=found["weight_norm"])
    if evidence.gradient is not None:
        G = evidence.gradient.to(W.device)
        found |= _gradient_facts(G, factors, s=s, lora=lora)
        if magnitude is not None:
            found["first_step_slope"] -= _magnitude_slope(W, G, factors, magnitude, s=s)
    if evidence.starved:
        found["start"] = "kaiming"
    if evidence.rows is not None:
        found["samples"] = evidence.rows
    return found | dict(evidence.facts) | dict(factors.facts)


def product_norm(A: Tensor, B: Tensor) -> float:
    """‖B·A‖ from the r×r Gram matrices."""
    A, B = A.double(), B.double()
    return float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())


def _captured_energy(W: Tensor, factors: Factors, *, whole: float) -> float:
    """‖Q_Bᵀ·W·Q_A‖²/‖W‖²."""
    Q_B, Q_A = torch.linalg.qr(factors.B).Q, torch.linalg.qr(factors.A.T).Q
    return (norm(Q_B.T @ W @ Q_A) / whole) ** 2


def _gradient_facts(G: Tensor, factors: Factors, *, s: float, lora: Lora) -> dict[str, Any]:
    A, B = factors.A, factors.B
    whole = norm(G)
    G_A, B_G = s * (G @ A.T), s * (B.T @ G)  # the gradients of B (out×r) and of A (r×in)
    facts = {
        "gradient_norm": whole,
        "gradient_alignment": _alignment(G, factors, whole=whole),
        # A sum of absolute values, because Adam's first step is the sign of the gradient times the rate.
        "first_step_slope": -float(G_A.abs().sum() + B_G.abs().sum()),
    }
    if not lora.method.function_preserving:
        facts["first_order_change"] = float((G_A * B).sum())
    return facts


def _magnitude_slope(W: Tensor, G: Tensor, factors: Factors, magnitude: Tensor, *, s: float) -> float:
    """Sum over the outputs of |∂L/∂m_i| = |<G_i, W_i + s·(B·A)_i>|/m_i, row by row; A and B are as without DoRA."""
    along = torch.einsum("ij,ij->i", G, W) + s * (G @ factors.A.T * factors.B).sum(1)
    return float((along / magnitude).abs().sum())


def _alignment(G: Tensor, factors: Factors, *, whole: float) -> float:
    """1 - ‖(I - P_B)·G·(I - P_A)‖²/‖G‖², because a first step cannot reach what is outside both spaces."""
    Q_B, Q_A = _span(factors.B), _span(factors.A.T)
    B_G, G_A = Q_B.T @ G, G @ Q_A
    reached = norm(B_G) ** 2 + norm(G_A) ** 2 - norm(B_G @ Q_A) ** 2
    return min(1.0, reached / whole**2) if whole else 0.0


def _span(X: Tensor) -> Tensor:
    """An orthonormal basis of X's columns; no columns for a zero X, for which QR would return arbitrary directions."""
    Q: Tensor = torch.linalg.qr(X).Q
    return Q if X.any() else Q[:, :0]


# --- the whole model ---------------------------------------------------------------------------


def summarize(
    lora: Lora, modules: Sequence[dict[str, Any]], *, seed: int, seconds: float, cached: bool, rate: float
) -> dict[str, Any]:
    """Everything of `job.init_report` that needs no forward pass."""
    method = lora.method
    ranks = [m["rank"] for m in modules]
    spread = {m["name"]: m["rank"] for m in modules if m["rank"] != lora.r}
    slopes = [m["first_step_slope"] for m in modules if "first_step_slope" in m]
    changes = [m["first_order_change"] for m in modules if "first_order_change" in m]
    return {
        "method": method.method,
        "seed": seed,
        "seconds": round(seconds, 3),
        "cached": cached,
        "samples": max((m["samples"] for m in modules if "samples" in m), default=None),
        "modules": len(modules),
        "peak_memory_bytes": peak_memory_bytes(),
        "function_preserving": method.function_preserving,
        "captured_energy": _spread(modules, "captured_energy"),
        "gradient_alignment": _spread(modules, "gradient_alignment"),
        "ranks": {"min": min(ranks), "max": max(ranks), "sum": sum(ranks)},
        "rank_pattern": spread,
        "quantization_error": None,
        **{name: modules[0].get(name) for name in SHARED},
        **SUMMARIES.get(method.method, _nothing)(modules),
        "expected_displacement_change": sum(changes) if changes else None,
        "expected_first_step_change": rate * sum(slopes) if slopes else None,
    }


def _nothing(_modules: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {}


def _spread(modules: Iterable[dict[str, Any]], key: str) -> dict[str, float] | None:
    values = [m[key] for m in modules if key in m]
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)} if values else None


@torch.no_grad()
def measure(model: nn.Module, probe: Batch) -> dict[str, Any]:
    """Loss and logits of the base and of the initialized model on the same rows."""
    with disable_adapters(model):
        base = run_batch(model, probe)
    initial = run_batch(model, probe)
    moved = [_moved(model, base, initial, row)[mask] for row, mask in enumerate(probe.attention.bool())]
    return {
        "base_loss": float(base.sums.loss) / base.sums.tokens,
        "initial_loss": float(initial.sums.loss) / initial.sums.tokens,
        "max_abs_logit_difference": max(float(row.max()) for row in moved),
    }


def _moved(model: nn.Module, base: BatchResult, initial: BatchResult, row: int) -> Tensor:
    """The largest difference of a logit from the base's, at each position of one row.

    Row by row, because the logits of a whole batch may be larger than the model.
    """
    with disable_adapters(model):
        before = base.logits_of_row(row)
    return before.sub_(initial.logits_of_row(row)).abs_().amax(-1)


@torch.no_grad()
def measure_displacement(model: nn.Module, batches: Sequence[Batch], *, tick: Callable[[], None]) -> dict[str, Any]:
    """Mean over the calibration rows of each row's loss, before and after a displaced start."""

    def loss() -> float:
        total = 0.0
        for batch in batches:
            total += _summed(batch, lambda part: float(row_losses(model, part).sum()))
            tick()
        return total / rows

    rows = sum(len(batch.ids) for batch in batches)
    with disable_adapters(model):
        before = loss()
    return {"before": before, "after": loss(), "rows": rows}


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], *, tick: Callable[[int], None]) -> float:
    """Nats per trained token over all rows. `tick` is called with the number of batches that are done."""
    loss, tokens = 0.0, 0
    for done, batch in enumerate(batches, start=1):
        loss += _summed(batch, lambda part: float(sum_losses(model, part).loss))
        tokens += len(batch.targets)
        tick(done)
    return loss / tokens


def _summed(batch: Batch, look: Callable[[Batch], float]) -> float:
    """`look` at a batch. If memory runs out, the sum of `look` over parts of it: halves, and so on down to one row."""
    rows = len(batch.ids)

    def halve() -> bool:
        nonlocal rows
        before, rows = rows, max(1, rows // 2)
        return rows < before

    return retry_until_it_fits(lambda: sum(map(look, [batch] if rows == len(batch.ids) else batch.cut(rows))), halve)


def check_start(summary: dict[str, Any], model: nn.Module) -> None:
    """Add `checks` to the summary, and refuse a start that is wrong.

    Raises:
        InitFailed: a function-preserving method changed the loss, or the loss is not finite after a displaced start.
    """
    base, initial = summary["base_loss"], summary["initial_loss"]
    dtype = weight_of(next(iter(adapted_layers(model).values())).base).dtype
    limit = LOSS_LIMIT[dtype] * max(1.0, abs(base))
    moved = abs(initial - base)
    passed = moved <= limit  # not `not moved > limit`, which would be true for NaN
    check = {"name": "initial_loss_equals_base", "passed": passed, "value": moved, "limit": limit}
    summary["checks"] = [check] if summary["function_preserving"] else []
    if summary["function_preserving"] and not passed:
        raise InitFailed(
            f"{summary['method']} promises to start as the base model, but the loss on training rows went from"
            f" {base:.4f} to {initial:.4f} (limit {limit:.2g}).",
            param="lora.init",
        )
    if not torch.isfinite(torch.tensor(initial)):
        raise InitFailed(f"The model's loss is not finite after {summary['method']}.", param="lora.init")
