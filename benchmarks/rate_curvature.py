"""The loss of an adapter around its start: gradients, products of the Hessian with directions, largest eigenvalues.

The Hessian (of the loss, in the adapter's parameters) is never formed. A product is a central difference of two
gradients, because our autograd functions cannot be differentiated twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# How far a difference goes: so far that the loss changes by this many nats, to first or second order. In bf16 it goes
# further, because rounding changes a gradient by about 1 % there, and in float32 by about a millionth.
NATS = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}


class Surroundings:
    """The loss as a function of the parameters around their present values, which it leaves as they are, bit for bit.

    Directions and gradients are float32 vectors over all parameters, one after the other.

    Args:
        evaluate: returns the loss in nats. If it is given True, it also adds the loss's gradients to those of the
            parameters.
        nats: how far differences go; an entry of `NATS`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], evaluate: Callable[[bool], float], *, nats: float) -> None:
        self.parameters, self.nats, self._evaluate = parameters, nats, evaluate
        self._center = [parameter.detach().clone() for parameter in parameters]

    def look(self, displacement: Tensor | None = None) -> tuple[float, Tensor]:
        """Loss and gradient at the center plus a displacement."""
        try:
            self._move(displacement)
            loss = self._evaluate(True)
            return loss, flatten([p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters])
        finally:
            self.restore()

    def restore(self) -> None:
        """Set the parameters to the center again, and drop their gradients."""
        self._move(None)
        for parameter in self.parameters:
            parameter.grad = None

    def loss(self, displacement: Tensor) -> float:
        """Loss at the center plus a displacement, without its gradient."""
        try:
            self._move(displacement)
            return self._evaluate(False)
        finally:
            self._move(None)

    def multiply(self, direction: Tensor, *, step: float) -> Tensor:
        """H·direction, from the gradients at `step` times the direction on both sides."""
        ahead, behind = self.look(step * direction)[1], self.look(-step * direction)[1]
        return (ahead - behind) / (2 * step)

    @torch.no_grad()
    def _move(self, displacement: Tensor | None) -> None:
        parts = [None] * len(self.parameters) if displacement is None else self.split(displacement)
        for parameter, center, part in zip(self.parameters, self._center, parts, strict=True):
            parameter.copy_(center if part is None else center + part)

    def split(self, vector: Tensor) -> list[Tensor]:
        """A vector as one tensor for each parameter, in its shape."""
        pieces = vector.split([parameter.numel() for parameter in self.parameters])
        return [piece.view_as(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)]


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all of them."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def curvature_along(around: Surroundings, gradient: Tensor, direction: Tensor) -> float:
    """directionᵀ·H·direction. Takes two gradients.

    The step is such that the loss changes by `around.nats` to first order, so `gradient`·`direction` must not be 0.
    """
    step = around.nats / abs(_dot(gradient, direction))
    return _dot(direction, around.multiply(direction, step=step))


@dataclass(frozen=True)
class Extremes:
    """The largest and the smallest eigenvalue that were found, and how many gradients it took.

    `residual`: a bound on the distance between `largest` and an eigenvalue of H, as a share of it.
    """

    largest: float
    smallest: float
    residual: float
    gradients: int


def extreme_eigenvalues(around: Surroundings, gradient: Tensor, *, products: int, seed: int) -> Extremes:
    """The extreme eigenvalues of H by the Lanczos method, which is power iteration that keeps all its vectors.

    Power iteration alone finds only the largest absolute value, and is slow where the largest and the smallest
    eigenvalue are alike, as they are where B starts at zero. It begins with the gradient and a random vector in equal
    parts: the gradient because it lies mostly in directions of large curvature, the random one so that it has a part
    in every direction. After Golub & Van Loan, Matrix Computations, 10.1, with full orthogonalization.

    Args:
        products: how many products of H with a vector are made; each takes two gradients, and one more is made to
            find the step.
    """
    noise = torch.randn(len(gradient), generator=torch.Generator().manual_seed(seed)).to(gradient.device)
    first = _normalized(_normalized(gradient) + _normalized(noise))
    step = (2 * around.nats / abs(curvature_along(around, gradient, first))) ** 0.5
    vectors, diagonal, beside = [first], list[float](), list[float]()
    for _ in range(products):
        w = around.multiply(vectors[-1], step=step)
        diagonal.append(_dot(w, vectors[-1]))
        for _ in range(2):  # twice, because rounding leaves a rest after the first time
            for vector in vectors:
                w -= _dot(w, vector) * vector
        beside.append(float(w.norm()))
        vectors.append(w / beside[-1])
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    T += torch.diag(torch.tensor(beside[:-1], dtype=torch.float64), 1)
    values, parts = torch.linalg.eigh(T, UPLO="U")
    residual = beside[-1] * abs(float(parts[-1, -1]))
    return Extremes(float(values[-1]), float(values[0]), residual / abs(float(values[-1])), 2 * (products + 1))


def _normalized(vector: Tensor) -> Tensor:
    unit: Tensor = vector / vector.norm()
    return unit


def _dot(one: Tensor, other: Tensor) -> float:
    return float(one.double() @ other.double())
