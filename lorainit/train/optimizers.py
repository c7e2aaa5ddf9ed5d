"""The optimizers a run may choose, over the (A, B) pairs of the adapted layers and DoRA's magnitudes.

Every parameter group has a `factor`, by which the scheduled rate is multiplied. All state is in tensors per
parameter, so that a checkpoint can store any of these optimizers in the same way.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.config.errors import NonFiniteLoss
from lorainit.config.spec import AdamWLoRAPlus, AdamWPreconditioned, Hyperparameters
from lorainit.model.layers.layer import LoRALinear

BETAS, EPS = (0.9, 0.999), 1e-8
# With damping 0 a Gram matrix counts as singular if its smallest squared pivot is at most this share of its largest.
# No such limit is needed with damping, because damping·I keeps the matrix away from singular ones.
SINGULAR = 1e-7


def make_optimizer(recipe: Hyperparameters, layers: Mapping[str, LoRALinear]) -> torch.optim.Optimizer:
    """The optimizer of a resolved recipe, over the trained parameters of `layers`.

    Every optimizer trains DoRA's magnitudes by plain AdamW at A's rate. They have no weight decay, because a smaller
    magnitude makes the whole weight smaller, while smaller A and B make only the change of the weight smaller.
    """
    assert recipe.learning_rate is not None
    chosen, rate, decay = recipe.optimizer, recipe.learning_rate, recipe.weight_decay
    if isinstance(chosen, AdamWPreconditioned):
        pairs = {name: (layer.A, layer.B) for name, layer in layers.items()}
        kind = PreconditionedAdamW if chosen.update == "sequential" else SimultaneousAdamW
        return kind(pairs, lr=rate, damping=chosen.damping, weight_decay=decay, magnitudes=_magnitudes(layers))
    if isinstance(chosen, AdamWLoRAPlus):
        groups: list[dict[str, Any]] = [
            {"params": [layer.A for layer in layers.values()], "factor": 1.0},
            {"params": [layer.B for layer in layers.values()], "factor": chosen.ratio},
        ]
    else:
        groups = [{"params": [p for layer in layers.values() for p in (layer.A, layer.B)], "factor": 1.0}]
    if magnitudes := _magnitudes(layers):
        groups.append({"params": magnitudes, "factor": 1.0, "weight_decay": 0.0})
    # Fused, because it takes a quarter of the time for the factors of SmolLM2, and a group of eight adapters has
    # eight optimizers.
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=BETAS, eps=EPS, weight_decay=decay, fused=True)
    set_rate(optimizer, rate)
    return optimizer


def _magnitudes(layers: Mapping[str, LoRALinear]) -> list[nn.Parameter]:
    return [layer.magnitude for layer in layers.values() if layer.magnitude is not None]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of this step; each group gets it times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


class PreconditionedAdamW(torch.optim.Optimizer):
    """AdamW on gradients preconditioned by the other factor: the optimizer of LoRA-One's first version.

    g_A (r×in) and g_B (out×r) are the gradients of a pair. As in the paper's first version there is no factor s² and no
    bias correction, so the first step has size (1 - β1)/sqrt(1 - β2) = 3.16 times the rate:

        A moves by Adam on (BᵀB + damping·I)⁻¹·g_A
        B moves by Adam on g_B·(A·Aᵀ + damping·I)⁻¹, with the A that has just moved

    Zhang, Liu, Chen, arXiv 2502.01235v1; the preconditioner is Zhang & Pilanci's, arXiv 2402.02347.
    Weight decay is decoupled and comes last. Each group holds one pair, so that A and B cannot be mixed up. A last
    group holds the `magnitudes`. They are no pair, so torch's AdamW updates them.

    Raises:
        SingularPreconditioner: a factor has lost rank and the damping does not make up for it.
    """

    def __init__(
        self,
        pairs: Mapping[str, tuple[nn.Parameter, nn.Parameter]],
        *,
        lr: float,
        damping: float = 1e-6,
        weight_decay: float = 0.0,
        magnitudes: Sequence[nn.Parameter] = (),
    ) -> None:
        groups = [{"params": list(pair), "name": name, "factor": 1.0} for name, pair in pairs.items()]
        super().__init__(groups, {"lr": lr, "damping": damping, "weight_decay": weight_decay})
        self.pairs, self.plain = list(self.param_groups), None
        if magnitudes:
            plain = {"params": list(magnitudes), "factor": 1.0}
            self.plain = torch.optim.AdamW([plain], lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0)
            # Shared, so that code which sets the rate or stores the state sees a single optimizer.
            self.param_groups += self.plain.param_groups
            self.state = self.plain.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every pair: all A first, then all B; then the magnitudes."""
        if closure is not None:
            raise ValueError("closures are not supported: B's gradient would be evaluated at the old A")
        for own, other in ((0, 1), (1, 0)):
            grams = [_gram(g["params"][other], rows=other == 0) for g in self.pairs]
            inverses = _inverses(grams, self.pairs)
            for group, inverse in zip(self.pairs, inverses, strict=True):
                parameter = group["params"][own]
                assert parameter.grad is not None
                inverse = inverse.to(parameter.dtype)
                self._adam(parameter, inverse @ parameter.grad if own == 0 else parameter.grad @ inverse, group)
        if self.plain:
            self.plain.step()

    def _adam(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.mul_(BETAS[0]).add_(gradient, alpha=1 - BETAS[0])
        v.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        parameter.addcdiv_(m, v.sqrt().add_(EPS), value=-group["lr"])
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


class SimultaneousAdamW(torch.optim.AdamW):
    """torch's AdamW, bias correction included, on gradients preconditioned by the other factor before either moves.

    (BᵀB + damping·I)⁻¹·g_A and g_B·(A·Aᵀ + damping·I)⁻¹ take the place of the gradients: what PEFT ships as
    `create_riemannian_optimizer`, with its damping of 1e-2 (there `reg`), and equation 9 of LoRA-One's paper.
    The `magnitudes` of DoRA are no pair, so plain AdamW updates them; they have no weight decay.

    Raises:
        SingularPreconditioner: as for `PreconditionedAdamW`.
    """

    def __init__(
        self,
        pairs: Mapping[str, tuple[nn.Parameter, nn.Parameter]],
        *,
        lr: float,
        damping: float,
        weight_decay: float,
        magnitudes: Sequence[nn.Parameter] = (),
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(pair), "name": name, "factor": 1.0, "damping": damping} for name, pair in pairs.items()
        ]
        if magnitudes:
            groups.append({"params": list(magnitudes), "factor": 1.0, "weight_decay": 0.0})
        super().__init__(groups, lr=lr, betas=BETAS, eps=EPS, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every pair."""
        if closure is not None:
            raise ValueError("closures are not supported: they would overwrite the preconditioned gradients")
        for own, other in ((0, 1), (1, 0)):
            pairs = [group for group in self.param_groups if "damping" in group]
            grams = [_gram(g["params"][other], rows=other == 0) for g in pairs]
            for group, inverse in zip(pairs, _inverses(grams, pairs), strict=True):
                parameter = group["params"][own]
                assert parameter.grad is not None
                inverse = inverse.to(parameter.dtype)
                parameter.grad = inverse @ parameter.grad if own == 0 else parameter.grad @ inverse
        super().step()


class SingularPreconditioner(NonFiniteLoss):
    """A Gram matrix of a factor cannot be inverted.

    The authors' code then uses the identity instead. We do not, because this would hide that training has failed.
    """


def _gram(factor: Tensor, *, rows: bool) -> Tensor:
    """A·Aᵀ (`rows`) or BᵀB: r×r, in float64, because its condition number is that of the factor squared."""
    F = factor.double()
    return F @ F.T if rows else F.T @ F


def _inverses(grams: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """(gram + damping·I)⁻¹ of each.

    Matrices of one size are inverted in one call, since otherwise a GPU would spend most time on kernel launches.
    """
    inverses: list[Tensor] = [torch.empty(0)] * len(grams)
    kinds = [(len(gram), group["damping"] == 0) for gram, group in zip(grams, groups, strict=True)]
    for rank, undamped in set(kinds):
        where = [i for i, kind in enumerate(kinds) if kind == (rank, undamped)]
        eye = torch.eye(rank, dtype=torch.float64, device=grams[where[0]].device)
        damped = torch.stack([grams[i] + groups[i]["damping"] * eye for i in where])
        factors, failed = torch.linalg.cholesky_ex(damped)
        singular = (failed != 0) | _near_singular(factors) if undamped else failed != 0
        if singular.any():
            raise _singular(groups[where[int(singular.nonzero()[0])]])
        for i, inverse in zip(where, torch.cholesky_inverse(factors), strict=True):
            inverses[i] = inverse
    return inverses


def _near_singular(factors: Tensor) -> Tensor:
    """Whether a Gram matrix, given its Cholesky factor, is singular up to the rounding of the float32 factors."""
    pivots = factors.diagonal(dim1=-2, dim2=-1).square()
    return pivots.amin(-1) <= SINGULAR * pivots.amax(-1)


def _singular(group: Mapping[str, Any]) -> SingularPreconditioner:
    return SingularPreconditioner(
        f"The preconditioner of {group['name']} is singular at damping {group['damping']:g}: its factors have lost"
        " rank. A larger damping, a smaller r or a lower learning rate helps.",
        param="training.optimizer.damping",
    )
