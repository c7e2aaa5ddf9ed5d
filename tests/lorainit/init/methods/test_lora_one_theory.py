"""What LoRA-One's paper proves, as small float64 simulations (arXiv 2502.01235).

The paper's orientation: W is d×k, the adapter A·B with A d×r and B r×k. G is the *negative* gradient
at W0. Bands hold for any draw of the data that was tried, not only for the seed used here.
"""

import math

import pytest
import torch

F64 = torch.float64
D = 100


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def orthonormal(rows, columns, g):
    return torch.linalg.qr(torch.randn(rows, columns, generator=g, dtype=F64)).Q


def teacher(sigma, N, seed=0):
    """(Δ, H): a rank-r* target d×d with singular values `sigma`, and the second moment of N Gaussian inputs."""
    g = generator(seed)
    U, V = orthonormal(D, len(sigma), g), orthonormal(D, len(sigma), g)
    H = torch.zeros(D, D, dtype=F64)
    for start in range(0, N, 20_000):
        X = torch.randn(min(20_000, N - start), D, generator=g, dtype=F64)
        H += X.T @ X / N
    return U @ torch.diag(torch.tensor(sigma, dtype=F64)) @ V.T, H


def spread(kappa):
    return torch.linspace(1, 1 / kappa, 4).tolist()


def spectral(G, r, gamma=1.0):
    """The theory's start: A = U·sqrt(gamma·S), B = sqrt(gamma·S)·Vᵀ."""
    U, S, Vh = torch.linalg.svd(G)
    root = (gamma * S[:r]).sqrt()
    return U[:, :r] * root, root[:, None] * Vh[:r]


def descend(A, B, gradient, *, rate, steps, preconditioned=False, damping=0.0):
    """The path of (A, B) under simultaneous steps; `gradient` is that of the loss in A·B."""
    path = [(A, B)]
    eye = damping * torch.eye(A.shape[1], dtype=F64)
    for _ in range(steps):
        g = gradient(A @ B)
        g_A, g_B = g @ B.T, A.T @ g
        if preconditioned:
            g_A, g_B = g_A @ torch.linalg.inv(B @ B.T + eye), torch.linalg.inv(A.T @ A + eye) @ g_B
        A, B = A - rate * g_A, B - rate * g_B
        path.append((A, B))
    return path


def linear(target, H):
    return lambda M: H @ (M - target)


def factor(path, target, first, last):
    """Geometric mean of the per-step factor of ‖AB - target‖_F between two steps."""
    error = [float(torch.linalg.norm(A @ B - target)) for A, B in (path[first], path[last])]
    return (error[1] / error[0]) ** (1 / (last - first))


def risk(A, B, target):
    return 0.5 * float((A @ B - target).square().sum())


def loss_ratio(M, target, H):
    """loss(M)/loss(0) of the linear teacher."""
    E = M - target
    return float((E * (H @ E)).sum() / (target * (H @ target)).sum())


# --- linear teacher: where LoRA goes by itself --------------------------------------------------


def left_angle(U, A):
    """Sine of the largest angle between span(U), d×4, and the top-4 left singular space of A."""
    top = torch.linalg.svd(A, full_matrices=False).U[:, :4]
    return math.sqrt(max(0.0, 1 - float(torch.linalg.svdvals(U.T @ top)[-1]) ** 2))


def test_lora_drifts_into_the_gradients_subspace_if_it_starts_small():
    target, H = teacher([1.0] * 4, 1600)
    U, _, Vh = torch.linalg.svd(H @ target)
    U, V = U[:, :4], Vh[:4].T
    angles, risks = [], []
    for variance in (1.0, 0.1, 0.01, 0.001, 0.0001):
        A = variance**0.5 * torch.randn(D, 8, generator=generator(1), dtype=F64)
        path = descend(A, torch.zeros(8, D, dtype=F64), linear(target, H), rate=1 / 64, steps=1500)
        angles.append(min(left_angle(U, A) for A, _ in path[::10]))
        risks.append(risk(*path[-1], target))  # type: ignore[call-arg]
        # The right space of B_t is that of the gradient from the first step on, exactly.
        off = max(float((B - B @ V @ V.T).norm() / B.norm()) for _, B in path[1::50])
        assert off < 1e-10
    assert angles == sorted(angles, reverse=True)
    assert angles[0] > 0.95
    assert angles[3] < 0.3
    assert risks == sorted(risks, reverse=True)
    assert risks[0] > 0.1
    assert risks[3] < 1e-9


# --- linear teacher: the spectral start ---------------------------------------------------------


def test_spectral_start_misses_the_target_by_the_inputs_deviation_from_identity():
    target, H = teacher(spread(4), 1600)
    A, B = spectral(H @ target, 8)
    assert torch.allclose(A @ B - target, (H - torch.eye(D, dtype=F64)) @ target, atol=1e-10)
    error = float(torch.linalg.norm(A @ B - target) / torch.linalg.norm(target))
    assert 0.20 < error < 0.30


def test_spectral_start_improves_with_the_root_of_the_samples():
    errors = []
    for N in (400, 1600, 6400, 25_600):
        target, H = teacher(spread(4), N)
        A, B = spectral(H @ target, 8)
        errors.append(float(torch.linalg.norm(A @ B - target) / torch.linalg.norm(target)))
    assert errors == pytest.approx([math.sqrt(D / N) for N in (400, 1600, 6400, 25_600)], rel=0.15)


def test_loss_at_the_spectral_start_falls_with_the_samples():
    found = []
    for N in (400, 1600, 6400, 25_600):
        target, H = teacher(spread(4), N)
        found.append(loss_ratio(torch.matmul(*spectral(H @ target, 8)), target, H))
    # Two independent implementations: .337/.269, .069/.058, .016, .004.
    assert found == pytest.approx([0.30, 0.064, 0.016, 0.004], rel=0.25)


def test_too_large_a_step_is_worse_than_none():
    target, H = teacher(spread(4), 1600)
    gammas = (0.25, 0.5, 1.0, 1.5, 2.0)
    found = [loss_ratio(torch.matmul(*spectral(H @ target, 8, gamma)), target, H) for gamma in gammas]
    assert min(found) == found[2] < 0.1
    assert found[-1] > 1


def test_spectral_start_of_too_small_a_rank_is_close_to_the_best_of_that_rank():
    target, H = teacher(spread(4), 25_600)
    A, B = spectral(H @ target, 2)
    best = math.sqrt((0.5**2 + 0.25**2) / (1 + 0.75**2 + 0.5**2 + 0.25**2))
    error = float(torch.linalg.norm(A @ B - target) / torch.linalg.norm(target))
    assert best == pytest.approx(0.408, abs=1e-3)
    assert error == pytest.approx(best, rel=0.03)


# --- linear teacher: the preconditioner ---------------------------------------------------------


def test_preconditioned_descent_does_not_feel_the_condition_number():
    found = []
    for kappa in (1, 4, 10, 50):
        target, H = teacher(spread(kappa), 1600)
        path = descend(*spectral(H @ target, 4), linear(target, H), rate=0.5, steps=20, preconditioned=True)
        found.append(factor(path, target, 5, 20))
    assert all(0.65 < f < 0.72 for f in found)
    assert max(found) - min(found) < 0.01


def test_preconditioned_descent_tends_to_one_minus_the_rate_with_many_samples():
    found = []
    for N in (1600, 25_600, 400_000):
        target, H = teacher(spread(4), N)
        path = descend(*spectral(H @ target, 4), linear(target, H), rate=0.5, steps=15, preconditioned=True)
        found.append(factor(path, target, 10, 15))
    assert found == sorted(found, reverse=True)
    assert 0.5 < found[-1] < 0.51


@pytest.mark.parametrize(("damping", "factor_"), [(1e-6, 0.64), (1e-3, 0.676)])
def test_damping_carries_a_rank_above_the_targets(damping, factor_):
    """r = 8 on a gradient of rank 4: contraction with damping, and none to be had without."""
    target, H = teacher(spread(4), 1600)
    start = spectral(H @ target, 8)
    path = descend(*start, linear(target, H), rate=0.5, steps=20, preconditioned=True, damping=damping)
    assert factor(path, target, 5, 20) == pytest.approx(factor_, abs=0.04)


def test_plain_descent_from_the_same_start_slows_down_with_the_condition_number():
    found = {}
    for kappa in (1, 4, 10, 50):
        target, H = teacher(spread(kappa), 1600)
        path = descend(*spectral(H @ target, 4), linear(target, H), rate=0.5, steps=60)
        found[kappa] = factor(path, target, 20, 60)
    assert list(found.values()) == sorted(found.values())
    assert found[4] >= 0.90
    assert found[50] >= 0.96


@pytest.mark.parametrize(("kappa", "steps"), [(4, 100), (50, 200)])
def test_preconditioned_beats_spectral_beats_random(kappa, steps):
    target, H = teacher(spread(kappa), 1600)
    start = spectral(H @ target, 4)
    random = 1e-2 * torch.randn(D, 4, generator=generator(1), dtype=F64), torch.zeros(4, D, dtype=F64)
    gradient = linear(target, H)
    paths = [
        descend(*start, gradient, rate=0.5, steps=steps, preconditioned=True),
        descend(*start, gradient, rate=0.5, steps=steps),
        descend(*random, gradient, rate=0.5, steps=steps),
    ]
    best, middle, worst = (float((A @ B - target).norm() / target.norm()) for A, B in (p[-1] for p in paths))
    assert best < 1e-14
    assert 1e-8 < middle < worst


def test_lora_ga_start_stalls_because_its_target_has_a_higher_rank():
    """Subtracted starts train towards Δ + A0·B0: rank 8 for LoRA-One's v1, rank 12 for LoRA-GA."""
    target, H = teacher(spread(4), 1600)
    U, _, Vh = torch.linalg.svd(H @ target)
    c = D**0.25 / 2
    starts = {
        "v3": (spectral(H @ target, 8), target),
        "v1": ((c * U[:, :8], c * Vh[:8]), target + c * c * U[:, :8] @ Vh[:8]),
        "ga": ((c * U[:, :8], c * Vh[8:16]), target + c * c * U[:, :8] @ Vh[8:16]),
    }
    found = {}
    for name, (start, goal) in starts.items():
        path = descend(*start, linear(goal, H), rate=0.5, steps=100, preconditioned=True, damping=1e-3)
        found[name] = risk(*path[-1], goal)  # type: ignore[call-arg]
    assert found["v3"] < 1e-15
    assert found["v1"] < 1e-15
    assert 0.03 < found["ga"] < 0.08
    goal = starts["ga"][1]
    assert int(torch.linalg.matrix_rank(goal, rtol=1e-8)) == 12
    # The floor is the best rank-8 fit in the norm of the inputs.
    L, Q = torch.linalg.eigh(H)
    root, inverse = Q @ torch.diag(L.sqrt()) @ Q.T, Q @ torch.diag(1 / L.sqrt()) @ Q.T
    U, S, Vh = torch.linalg.svd(root @ goal)
    floor = inverse @ (U[:, :8] * S[:8]) @ Vh[:8]
    assert found["ga"] == pytest.approx(0.5 * float((floor - goal).square().sum()), rel=1e-8)


def test_subspaces_frozen_at_the_gradients_leave_most_of_the_risk():
    target, H = teacher(spread(4), 1600)
    U, _, Vh = torch.linalg.svd(H @ target)
    U, V = U[:, :4], Vh[:4].T
    core = torch.linalg.solve(U.T @ H @ U, U.T @ H @ target @ V)  # least loss over U·core·Vᵀ
    frozen, start = risk(U @ core, V.T, target), risk(*spectral(H @ target, 4), target)  # type: ignore[call-arg]
    assert 0.03 < frozen < start < 0.08


# --- ReLU teacher -------------------------------------------------------------------------------


class Relu:
    """Y = relu(X(W0 + Δ)), d = k = 50, r* = 2, N = 20000."""

    def __init__(self, condition, seed=0):
        g = generator(seed)
        d, N = 50, 20_000
        U, V = orthonormal(d, 2, g), orthonormal(d, 2, g)
        self.target = U @ torch.diag(torch.tensor([1.0, 1 / condition], dtype=F64)) @ V.T
        self.W0 = torch.randn(d, d, generator=g, dtype=F64)
        self.X = torch.randn(N, d, generator=g, dtype=F64)
        self.Y = (self.X @ (self.W0 + self.target)).relu()

    def gradient(self, M):
        Z = self.X @ (self.W0 + M)
        return self.X.T @ ((Z.relu() - self.Y) * (Z > 0)) / len(self.X)

    def loss(self, M):
        return 0.5 * float(((self.X @ (self.W0 + M)).relu() - self.Y).square().sum()) / len(self.X)

    def start(self, gamma):
        return spectral(-self.gradient(torch.zeros_like(self.target)), 2, gamma)


def test_relu_halves_the_gradient_so_twice_the_step_is_right():
    relu = Relu(2)
    S = torch.linalg.svdvals(relu.gradient(torch.zeros_like(relu.target)))[:2]
    assert S.tolist() == pytest.approx([0.5, 0.25], rel=0.1)
    errors, losses = [], []
    for gamma in (1.0, 2.0):
        A, B = relu.start(gamma)
        errors.append(float((A @ B - relu.target).norm() / relu.target.norm()))
        losses.append(relu.loss(A @ B) / relu.loss(torch.zeros_like(A @ B)))
    assert errors[1] < 0.1
    assert errors[0] > 5 * errors[1]
    assert losses[0] == pytest.approx(0.26, abs=0.05)
    assert losses[1] < 0.01


@pytest.mark.parametrize("condition", [2, 20])
def test_relu_contraction_is_one_minus_half_the_rate_whatever_the_condition(condition):
    relu = Relu(condition)
    fast = descend(*relu.start(2.0), relu.gradient, rate=0.5, steps=30, preconditioned=True)
    assert 0.74 < factor(fast, relu.target, 10, 30) < 0.80
    slow = factor(descend(*relu.start(2.0), relu.gradient, rate=0.5, steps=30), relu.target, 10, 30)
    assert slow > (0.85 if condition == 2 else 0.97)


# --- the preconditioned step itself, in our letters ---------------------------------------------


def pair(r=4, m=12, n=15):
    """(A r×n, B m×r, G m×n)."""
    g = generator(3)
    return tuple(torch.randn(*shape, generator=g, dtype=F64) for shape in ((r, n), (m, r), (m, n)))


def step(A, B, G, *, rate, damping=0.0, plain=False):
    """One simultaneous preconditioned step on a loss whose gradient in B·A is G; the new product."""
    eye = damping * torch.eye(len(A), dtype=F64)
    P, Q = (torch.eye(len(A), dtype=F64),) * 2
    if not plain:
        P, Q = torch.linalg.inv(B.T @ B + eye), torch.linalg.inv(A @ A.T + eye)
    return (B - rate * G @ A.T @ Q) @ (A - rate * P @ B.T @ G)


def test_step_does_not_depend_on_how_the_product_is_factored():
    A, B, G = pair()
    M = torch.randn(4, 4, generator=generator(4), dtype=F64)

    def change(**options):
        one, two = step(A, B, G, rate=0.1, **options), step(torch.linalg.inv(M) @ A, B @ M, G, rate=0.1, **options)
        return float((one - two).norm() / (one - B @ A).norm())

    assert change() < 1e-8
    assert change(damping=1e-6) < 1e-4
    assert change(plain=True) > 0.5


def test_small_step_moves_the_product_by_the_projected_gradient():
    A, B, G = pair()
    rate = 1e-3
    P_A = A.T @ torch.linalg.inv(A @ A.T) @ A
    P_B = B @ torch.linalg.inv(B.T @ B) @ B.T
    wanted = -rate * (G @ P_A + P_B @ G)
    found = step(A, B, G, rate=rate) - B @ A
    assert float((found - wanted).norm() / wanted.norm()) < 2e-3
