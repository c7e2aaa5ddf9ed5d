"""What each method promises about the factors of one layer."""

import math
from pathlib import Path

import pytest
import torch

from lorainit.config.errors import InitFailed, UnsupportedInit
from lorainit.config.inits import INITS
from lorainit.init import methods
from lorainit.init.evidence import Evidence
from lorainit.init.linalg import numerical_rank, randomized_svd
from lorainit.init.methods import METHODS
from lorainit.init.norms import norm, row_norms

SCALES = [0.25, 1.0, 2.0, math.sqrt(8)]


def weight(m=48, n=64, seed=0):
    """Singular values that fall like 1/i: what subspace methods are made for."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(m, m, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    k = min(m, n)
    return U[:, :k] @ torch.diag(1 / torch.arange(1.0, k + 1)) @ V[:, :k].T


def factors(method, W, rank=8, scale=1.0, seed=0, known=None, **parameters):
    """The factors of a method; `known`: the evidence it is given, by default something for every need."""
    config = INITS[method].model_validate({"method": method, **parameters})
    generator = torch.Generator().manual_seed(seed)
    known = known or evidence(*W.shape)
    return METHODS[method](W, known, rank=rank, scale=scale, config=config, generator=generator)


def evidence(m, n, k=16):
    """Something for every need, as a collector would have found it."""
    g = torch.Generator().manual_seed(1)
    X = torch.randn(4 * n, n, generator=g)
    return Evidence(
        gradient=torch.randn(m, n, generator=g),
        second_moment=X.T @ X / len(X),
        directions=torch.linalg.qr(X[:n]).Q[:k],
        spread=torch.arange(k, 0, -1.0),
        preheated=(torch.randn(k, n, generator=g), torch.randn(m, k, generator=g)),
        original=torch.randn(m, n, generator=g),
    )


def test_every_file_of_the_folder_is_the_method_of_an_initialization():
    folder = Path(str(methods.__file__)).parent
    assert {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")} == INITS.keys()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_factors_have_their_shapes_and_are_float32(method, shape):
    found = factors(method, weight(*shape))
    assert (found.A.shape, found.B.shape) == ((8, shape[1]), (shape[0], 8))
    assert found.A.dtype == found.B.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bits_and_the_global_generator_is_untouched(method):
    W = weight()
    before, state = W.clone(), torch.get_rng_state()
    one = factors(method, W)
    torch.rand(3)
    two = factors(method, W)
    torch.set_rng_state(state)
    factors(method, W)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.A, two.A)
    assert torch.equal(one.B, two.B)
    assert torch.equal(W, before)


@pytest.mark.parametrize("method", [m for m, kind in INITS.items() if kind.facts.needs not in ("none", "weight")])
def test_missing_evidence_is_refused(method):
    with pytest.raises(InitFailed, match="collected"):
        METHODS[method](
            weight(),
            Evidence(),
            rank=4,
            scale=1.0,
            config=INITS[method].model_validate({"method": method}),
            generator=torch.Generator(),
        )


@pytest.mark.parametrize("method", ["kaiming", "gaussian", "orthogonal"])
def test_another_seed_gives_another_start(method):
    assert not torch.equal(factors(method, weight(), seed=0).A, factors(method, weight(), seed=1).A)


def test_kaiming_is_uniform_within_one_over_root_in():
    found = factors("kaiming", torch.zeros(8, 4096), rank=16, known=Evidence())
    assert found.A.abs().max() <= 4096**-0.5
    assert float(found.A.var()) * 3 * 4096 == pytest.approx(1, rel=0.02)
    assert float(found.A.norm(dim=1).mean()) == pytest.approx(0.577, abs=2e-3)
    assert not found.B.any()


def test_gaussian_has_standard_deviation_one_over_r():
    found = factors("gaussian", torch.zeros(8, 4096), rank=16, known=Evidence())
    assert float(found.A.std()) * 16 == pytest.approx(1, rel=0.02)
    assert not found.B.any()


def test_orthogonal_factors_multiply_to_zero_with_half_rank_each():
    found = factors("orthogonal", torch.zeros(48, 64))
    assert (found.B @ found.A).abs().max() <= 1e-6
    assert torch.linalg.matrix_rank(found.A) == torch.linalg.matrix_rank(found.B) == 4
    assert found.A.std() > 0.05
    assert found.B.std() > 0.05
    halved = factors("orthogonal", torch.zeros(48, 64), divisor=20.0)
    assert torch.allclose(halved.A, found.A / 2)
    assert torch.allclose(halved.B, found.B / 2)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("niter", [None, 16])
def test_pissa_is_the_best_low_rank_part_of_the_weight(scale, niter):
    W = weight()
    U, S, Vh = torch.linalg.svd(W)
    found = factors("pissa", W, scale=scale, niter=niter)
    best = U[:, :8] @ torch.diag(S[:8]) @ Vh[:8]
    assert torch.allclose(scale * found.B @ found.A, best, atol=1e-6)
    split = torch.diag(S[:8] / scale)
    assert torch.allclose(found.A @ found.A.T, split, atol=1e-5)
    assert torch.allclose(found.B.T @ found.B, split, atol=1e-5)
    residual = torch.linalg.svdvals(W - scale * found.B @ found.A)
    assert float(residual[0]) == pytest.approx(float(S[8]), rel=1e-4)


@pytest.mark.parametrize("scale", SCALES)
def test_milora_is_the_bottom_part_of_the_weight(scale):
    W = weight()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    found = factors("milora", W, scale=scale)
    assert torch.allclose(scale * found.B @ found.A, U[:, -8:] @ torch.diag(S[-8:]) @ Vh[-8:], atol=1e-5)
    assert (found.A @ factors("pissa", W).A.T).abs().max() < 1e-5


def of_rank(kept):
    U, S, Vh = torch.linalg.svd(weight(), full_matrices=False)
    return U[:, :kept] @ torch.diag(S[:kept]) @ Vh[:kept]


@pytest.mark.parametrize("kept", [8, 20, 29])
def test_milora_passes_over_directions_that_the_weight_does_not_have(kept):
    U, S, Vh = (part.float() for part in torch.linalg.svd(of_rank(kept).double(), full_matrices=False))
    found = factors("milora", of_rank(kept))
    last = slice(kept - 8, kept)
    assert torch.allclose(found.B @ found.A, U[:, last] @ torch.diag(S[last]) @ Vh[last], atol=1e-5)


def test_milora_refuses_a_weight_with_fewer_directions_than_the_rank():
    with pytest.raises(UnsupportedInit, match="no gradient"):
        factors("milora", of_rank(7))


@pytest.mark.parametrize("scale", SCALES)
def test_olora_is_the_leading_part_of_the_qr_decomposition(scale):
    W = weight()
    Q, R = torch.linalg.qr(W)
    found = factors("olora", W, scale=scale)
    assert torch.allclose(found.B.T @ found.B, torch.eye(8), atol=1e-6)
    assert torch.equal(found.A[:, :8].tril(-1), torch.zeros(8, 8))
    assert torch.allclose(scale * found.B @ found.A, Q[:, :8] @ R[:8], atol=1e-6)
    assert torch.allclose(found.B @ found.B.T @ W[:, :8], W[:, :8], atol=1e-6)


def test_olora_without_scale_awareness_is_peft():
    W = weight()
    Q, R = torch.linalg.qr(W)
    found = factors("olora", W, scale=2.0, scale_aware=False)
    assert torch.allclose(found.B @ found.A, Q[:, :8] @ R[:8], atol=1e-6)
    reflected = W - 2 * found.B @ found.A
    assert float(torch.linalg.norm(reflected)) == pytest.approx(float(torch.linalg.norm(W)), rel=1e-5)


def svd(W, rank, niter, seed=1):
    return randomized_svd(W, rank=rank, niter=niter, generator=torch.Generator().manual_seed(seed))


def test_randomized_svd_needs_its_iterations_on_a_flat_spectrum():
    W = torch.randn(200, 150, generator=torch.Generator().manual_seed(0))
    best = float(torch.linalg.svdvals(W)[:16].square().sum())
    assert float(svd(W, 16, 16)[1].square().sum()) > 0.9999 * best
    assert float(svd(W, 16, 0)[1].square().sum()) < 0.7 * best


@pytest.mark.parametrize(("power", "tolerance"), [(0.5, 1e-3), (1.0, 1e-4)])
@pytest.mark.parametrize("shape", [(1024, 1024), (300, 500), (500, 300)])
def test_randomized_svd_finds_the_leading_space(shape, power, tolerance):
    """Subspace iteration with q = 4r and 4 iterations comes within 0.0019 for the first spectrum at 1024."""
    g, k = torch.Generator().manual_seed(0), min(shape)
    U, V = (torch.linalg.qr(torch.randn(d, k, generator=g, dtype=torch.float64)).Q for d in shape)
    S = torch.arange(1, k + 1, dtype=torch.float64) ** -power
    found, values, Vh = svd(((U * S) @ V.T).float(), 8, 16)
    left = found.double() - U[:, :8] @ (U[:, :8].T @ found.double())
    assert float(torch.linalg.matrix_norm(left, 2)) < tolerance  # the sine of the largest angle
    assert torch.allclose(values.double(), S[:8], rtol=1e-5)
    assert torch.allclose(Vh @ Vh.T, torch.eye(8), atol=1e-5)
    assert (Vh.gather(1, Vh.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
@pytest.mark.parametrize("k", [0, 3])
def test_randomized_svd_of_few_directions_fills_up_with_orthonormal_ones(shape, k):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(shape[0], k, generator=g) @ torch.randn(k, shape[1], generator=g)
    U, S, Vh = svd(W, 8, 64)
    assert torch.allclose((U * S) @ Vh, W, atol=1e-5)
    assert torch.allclose(U.T @ U, torch.eye(8), atol=1e-5)
    assert torch.allclose(Vh @ Vh.T, torch.eye(8), atol=1e-5)
    assert numerical_rank(S, W) == k


@pytest.mark.parametrize("exponent", range(-122, 118, 6))
def test_randomized_svd_does_not_depend_on_the_size(exponent):
    """From 2e-37 to 1e35, in steps of less than two decades; a power of two changes no digit."""
    W = weight(96, 128)
    (U, S, Vh), (scaled_U, scaled_S, scaled_Vh) = svd(W, 8, 16), svd(W * 2.0**exponent, 8, 16)
    assert torch.allclose(scaled_S * 2.0**-exponent, S, rtol=1e-5)
    assert torch.allclose(scaled_U, U, atol=1e-4)
    assert torch.allclose(scaled_Vh, Vh, atol=1e-4)


@pytest.mark.parametrize(("large", "small"), [(1e30, 1e-30), (1e18, 1e-8), (1.0, 1e-38), (1e-20, 1e-38)])
def test_randomized_svd_of_blocks_of_different_size_takes_the_larger(large, small):
    W = torch.zeros(40, 60)
    W[:8, :20], W[8:, 20:] = large * weight(8, 20), small * weight(32, 40)
    U, S, Vh = svd(W, 8, 16)
    assert torch.allclose(S / large, torch.linalg.svdvals(W[:8, :20] / large), rtol=1e-5)
    assert torch.allclose(U.T @ U, torch.eye(8), atol=1e-5)
    assert torch.allclose(Vh @ Vh.T, torch.eye(8), atol=1e-5)


@pytest.mark.parametrize("entry", [math.nan, math.inf, -math.inf])
def test_randomized_svd_refuses_what_is_not_finite(entry):
    W = weight(96, 128)
    W[3, 5] = entry
    with pytest.raises(InitFailed, match="non-finite"):
        svd(W, 8, 16)


# B and A of every method that looks at the weight, at 2^k times the weight, are at these powers of it.
POWERS = {"pissa": (0.5, 0.5), "milora": (0.5, 0.5), "olora": (0, 1), "loram": (0.5, 0.5)}


@pytest.mark.parametrize("exponent", [-116, -80, -40, 40, 80, 112])
@pytest.mark.parametrize("method", POWERS)
def test_start_grows_with_the_weight_over_the_range_of_float32(method, exponent):
    W = weight()
    found, scaled = factors(method, W), factors(method, W * 2.0**exponent)
    b, a = (2.0 ** (power * exponent) for power in POWERS[method])
    # The full SVD's vectors have a sign of their own.
    assert torch.allclose((scaled.B / b).abs(), found.B.abs(), atol=1e-4)
    assert torch.allclose((scaled.A / a).abs(), found.A.abs(), atol=1e-4)
    assert torch.allclose((scaled.B / b) @ (scaled.A / a), found.B @ found.A, atol=1e-4)


@pytest.mark.parametrize("exponent", [-116, -80, 80, 112])
@pytest.mark.parametrize("init", [{"method": "lora_one"}, {"method": "lora_one", "niter": None}, {"method": "lora_ga"}])
def test_start_from_a_gradient_does_not_depend_on_its_size(init, exponent):
    W, G = weight(), weight(seed=3)
    config = INITS[init["method"]](**init)

    def start(gradient):
        g = torch.Generator().manual_seed(0)
        evidence = Evidence(gradient=gradient)
        return METHODS[config.method](W, evidence, rank=8, scale=2.0, config=config, generator=g)

    found, scaled = start(G), start(G * 2.0**exponent)
    assert torch.allclose(scaled.B @ scaled.A, found.B @ found.A, atol=1e-4 * float(found.B.abs().max()))
    assert scaled.facts == found.facts


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1.0, 1e19, 1e30, 1e37])
def test_norms_are_right_over_the_range_of_float32(size):
    X = size * weight(96, 128)
    X[0] = 0
    assert norm(X) == pytest.approx(float(X.double().norm()), rel=1e-6)
    assert torch.allclose(row_norms(X), X.double().norm(dim=1), rtol=1e-6)


def test_randomized_svd_ends_when_another_block_adds_nothing():
    W = weight(96, 128)
    enough, more = svd(W, 8, 16), svd(W, 8, 64)
    assert all(torch.equal(a, b) for a, b in zip(enough, more, strict=True))
    assert not torch.equal(enough[0], svd(W, 8, 1)[0])


# --- known sizes ---------------------------------------------------------------------------------


def share(method, W, rank):
    """‖B·A‖/‖W‖."""
    found = factors(method, W, rank=rank, **({"niter": None} if method == "pissa" else {}))
    return float((found.B @ found.A).norm() / W.norm())


def test_pissa_takes_most_of_a_random_weight_and_milora_next_to_nothing():
    W = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    assert share("pissa", W, 4) == pytest.approx(0.60, abs=0.03)
    assert share("milora", W, 4) == pytest.approx(0.088, abs=0.03)


def test_olora_takes_less_of_a_random_weight_than_pissa():
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert share("olora", W, 8) == pytest.approx(0.47, abs=0.03)
    assert share("pissa", W, 8) == pytest.approx(0.61, abs=0.03)
