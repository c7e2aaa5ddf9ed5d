"""LoRAM against the paper's identities and reference values, in float64 where the formula allows it."""

import math

import pytest
import torch
from pydantic import ValidationError

from lorainit.config.errors import UnsupportedInit
from lorainit.config.inits import INITS
from lorainit.config.inits.weights import LoRAM
from lorainit.config.spec import Lora
from lorainit.data.batches import collate
from lorainit.init import report as init_report
from lorainit.init.evidence import Evidence
from lorainit.init.initialize import initialize
from lorainit.init.methods import METHODS
from lorainit.init.methods.loram import (
    loram,
    magnitude,
    make_bases,
    moments,
    product_variance,
    rank_factor,
    sine_basis,
    sine_variance,
)
from lorainit.model.forward.loss import logits_of
from lorainit.run import run
from tests.lorainit.reference import context, eight_rows, tiny

F64 = torch.float64
DST = LoRAM(method="loram")


def weight(m=64, n=96, seed=0, mean=0.0):
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=F64) * 0.02
    return W - W.mean() + mean


def factors(W, rank=8, scale=1.0, config=DST, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return loram(W, Evidence(), rank=rank, scale=scale, config=config, generator=generator)


@pytest.mark.parametrize(("d", "r"), [(7, 7), (64, 8), (4096, 128)])
def test_sine_basis_is_orthonormal(d, r):
    P = sine_basis(d, r)
    assert torch.allclose(P.T @ P, torch.eye(r, dtype=F64), rtol=0, atol=1e-12)
    assert torch.allclose(P.float().T @ P.float(), torch.eye(r), rtol=0, atol=1e-5)


def test_square_sine_basis_is_symmetric_and_its_own_inverse():
    P = sine_basis(40, 40)
    assert torch.allclose(P, P.T, rtol=0, atol=1e-12)
    assert torch.allclose(P @ P, torch.eye(40, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("m", "n"), [(64, 96), (4096, 1024), (896, 4864)])
@pytest.mark.parametrize("r", [1, 2, 3, 8, 64])
def test_variance_of_the_product_in_closed_form(m, n, r):
    P, S = sine_basis(m, r), sine_basis(n, r)
    expected = float((P @ S.T).var())
    assert sine_variance(m, n, r) == pytest.approx(expected, rel=1e-10)
    assert product_variance(P, S) == pytest.approx(expected, rel=1e-10)


REFERENCE = {
    (64, 96): {2: 2.158783e-4, 8: 1.151948e-3, 64: 1.025573e-2},
    (4096, 1024): {2: 3.199998e-7, 8: 1.692097e-6, 64: 1.502311e-5},
    (896, 4864): {2: 3.079546e-7, 8: 1.628464e-6, 64: 1.445831e-5},
}


@pytest.mark.parametrize(("shape", "r", "v"), [(s, r, v) for s, row in REFERENCE.items() for r, v in row.items()])
def test_variance_of_the_product_has_its_reference_values(shape, r, v):
    assert sine_variance(*shape, r) == pytest.approx(v, rel=1e-6)  # type: ignore[call-arg]


@pytest.mark.parametrize("r", [2, 4, 16, 64])
def test_variance_mode_gives_the_product_the_intended_variance(r):
    W = weight()
    P, S = make_bases(64, 96, r, config=DST, generator=torch.Generator())
    beta = magnitude(W, P, S, scale=1.0, config=DST)
    product = beta * beta * P @ S.T
    assert float(product.var() / W.var()) == pytest.approx(rank_factor(64, 96, r), rel=1e-10)
    found = factors(W.float(), rank=r)
    assert float((found.B @ found.A).var() / W.var()) == pytest.approx(rank_factor(64, 96, r), rel=1e-5)


def test_second_moment_mode_gives_the_product_the_intended_mean_square():
    W, config = weight(mean=0.01), LoRAM(method="loram", magnitude="second_moment")
    P, S = make_bases(64, 96, 8, config=config, generator=torch.Generator())
    product = magnitude(W, P, S, scale=1.0, config=config) ** 2 * P @ S.T
    assert float(product.square().mean() / W.square().mean()) == pytest.approx(rank_factor(64, 96, 8), rel=1e-10)
    found = factors(W, config=config)
    ratio = (found.B @ found.A).double().square().mean() / W.square().mean()
    assert float(ratio) == pytest.approx(rank_factor(64, 96, 8), rel=1e-5)


def test_singular_values_and_sizes_are_beta_squared():
    W = weight()
    P, S = make_bases(64, 96, 8, config=DST, generator=torch.Generator())
    beta2 = magnitude(W, P, S, scale=1.0, config=DST) ** 2
    found = factors(W)
    values = torch.linalg.svdvals(found.B.double() @ found.A.double())
    assert torch.allclose(values[:8], torch.full((8,), beta2, dtype=F64), rtol=1e-5)
    assert values[8:].max() < 1e-6 * beta2
    assert float(found.A.square().mean()) * 96 == pytest.approx(beta2, rel=1e-5)
    assert float(found.B.square().mean()) * 64 == pytest.approx(beta2, rel=1e-5)


@pytest.mark.parametrize("s", [0.25, 2.0, math.sqrt(8)])
def test_scale_aware_sizes_the_product_with_the_scale(s):
    W, config = weight(), LoRAM(method="loram", scale_aware=True)
    aware, plain = factors(W, scale=s, config=config), factors(W, scale=s)
    Q = rank_factor(64, 96, 8)
    assert float((s * aware.B @ aware.A).var() / W.var()) == pytest.approx(Q, rel=1e-5)
    assert float((s * plain.B @ plain.A).var() / W.var()) == pytest.approx(s * s * Q, rel=1e-5)


@pytest.mark.parametrize(
    ("side", "values"),
    [
        (4096, (0.250, 0.333, 0.417, 0.500, 0.583)),
        (1024, (0.300, 0.400, 0.500, 0.600, 0.700)),
        (768, (0.313, 0.417, 0.522, 0.626, 0.730)),
    ],
)
def test_rank_factors_are_those_of_the_table(side, values):
    for r, Q in zip((8, 16, 32, 64, 128), values, strict=True):
        assert rank_factor(side, 2 * side, r) == pytest.approx(Q, abs=6e-4)
        assert rank_factor(2 * side, side, r) == pytest.approx(Q, abs=6e-4)


@pytest.mark.parametrize(
    ("r", "c", "beta", "energy"),
    [(2, 0.657, 1.105, 1.489), (4, 0.811, 1.058, 1.254), (8, 0.902, 1.030, 1.127), (16, 0.950, 1.015, 1.063),
     (64, 0.987, 1.004, 1.016)],
)  # fmt: skip
def test_the_two_magnitudes_differ_by_the_bases_mean(r, c, beta, energy):
    """c = T²/(mn) in the limit of large sides; beta and mean square of B·A, variance over second moment."""
    m, n = 40_000, 50_000
    v = sine_variance(m, n, r)
    assert r - v * (m * n - 1) == pytest.approx(c, abs=1e-3)
    assert (r / (m * n) / v) ** 0.25 == pytest.approx(beta, abs=1e-3)
    assert r / (m * n) / v == pytest.approx(energy, abs=2e-3)


@pytest.mark.parametrize("kind", ["variance", "second_moment"])
def test_growth_constant_is_that_of_pissa_with_the_logarithm_for_its_share(kind):
    """k1 = Q·(m + n)·(mean square of W); PiSSA's own share of a random weight, 0.118, lies far below Q."""
    W = torch.randn(300, 200, generator=torch.Generator().manual_seed(1), dtype=F64)
    found = factors(W, config=LoRAM(method="loram", magnitude=kind))
    A, B = found.A.double(), found.B.double()
    k1 = 8 * (200 * A.square().mean() ** 2 + 300 * B.square().mean() ** 2)
    expected = rank_factor(300, 200, 8) * 500 * float(W.square().mean())
    assert float(k1) == pytest.approx(expected * (1.127 if kind == "variance" else 1), rel=0.02)
    S = torch.linalg.svdvals(W)
    assert rank_factor(300, 200, 8) == pytest.approx(0.392, abs=1e-3)
    assert float(S[:8].mean() ** 2 / S.square().mean()) * 8 / 200 == pytest.approx(0.118, abs=0.005)


def test_singular_values_exceed_those_of_a_random_weight():
    W = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    found = factors(W, rank=16, config=LoRAM(method="loram", magnitude="second_moment"))
    beta2 = float(found.B[:, 0].square().sum())
    assert beta2 == pytest.approx(math.sqrt(rank_factor(1024, 1024, 16) / 16) * float(W.norm()), rel=1e-4)
    assert float(factors(W, rank=16).B[:, 0].square().sum()) == pytest.approx(3.24 * 1.03, rel=0.03)
    assert float(torch.linalg.matrix_norm(W, 2)) == pytest.approx(1.28, abs=0.02)


def test_golden_example():
    W = torch.tensor([[(-1) ** (i + j) * (i + 1) / (j + 1) for j in range(6)] for i in range(4)], dtype=F64)
    P, S = make_bases(4, 6, 2, config=DST, generator=torch.Generator())
    a, b = 0.37174803, 0.60150096
    expected = torch.tensor([[a, b], [b, a], [b, -a], [a, -b]], dtype=F64)
    assert torch.allclose(P, expected, rtol=0, atol=1e-8)
    assert rank_factor(4, 6, 2) == 0.5
    assert sine_variance(4, 6, 2) == pytest.approx(0.0493118033, abs=1e-10)
    squares, variance = moments(W)
    assert variance == pytest.approx(1.9425342190, abs=1e-10)
    assert squares * 24 == pytest.approx(44.7416666667, abs=1e-9)
    beta = magnitude(W, P, S, scale=1.0, config=DST)
    assert beta == pytest.approx(2.1066721275, abs=1e-9)
    second = LoRAM(method="loram", magnitude="second_moment")
    assert magnitude(W, P, S, scale=1.0, config=second) == pytest.approx(1.8287866454, abs=1e-9)
    found = factors(W, rank=2)
    assert found.B[0].tolist() == pytest.approx([0.78315122, 1.26716530], abs=1e-6)
    assert found.A[0].tolist() == pytest.approx(
        [0.48858069, 0.88039199, 1.09783085, 1.09783085, 0.88039199, 0.48858069], abs=1e-6
    )
    residual = W - beta * beta * P @ S.T
    assert residual[0].tolist() == pytest.approx(
        [-0.49823474, -2.58061322, -1.14554674, -0.49065508, 0.90165310, 0.56630294], abs=1e-8
    )
    assert float(torch.linalg.norm(residual)) == pytest.approx(9.0559844516, abs=1e-9)


@pytest.mark.parametrize("scaling", [{"alpha": 8.0}, {"alpha": 8.0, "use_rslora": True}])
@pytest.mark.parametrize("config", [{}, {"magnitude": "second_moment"}, {"scale_aware": True}, {"basis": "gaussian"}])
def test_model_starts_as_the_base(scaling, config):
    """s = 1 and s = sqrt(r), to 1e-6 of the largest logit."""
    found = context(tiny(), eight_rows(), {"method": "loram", **config}, **scaling)
    probe = collate(eight_rows()[:4], pad=0)
    with torch.no_grad():
        largest = float(logits_of(found.model, probe).abs().max())
    report = initialize(found.model, found.targets, found.lora, seed=0, probe=probe, on_event=lambda event: None)
    assert report.summary["max_abs_logit_difference"] <= 1e-6 * largest


SVDS = [
    (torch, "svd"),
    (torch, "svd_lowrank"),
    (torch, "pca_lowrank"),
    (torch.linalg, "svd"),
    (torch.linalg, "svdvals"),
    (torch.linalg, "eig"),
    (torch.linalg, "eigh"),
    (torch.linalg, "matrix_norm"),
    (torch.linalg, "pinv"),
    (torch.Tensor, "svd"),
]


def refuse(*args, **kwargs):
    raise AssertionError("called")


def test_no_svd_and_no_random_number_is_used(monkeypatch):
    for owner, name in [*SVDS, (torch, "randn"), (torch, "rand")]:
        monkeypatch.setattr(owner, name, refuse)
    W = torch.linspace(-1, 1, 24).reshape(4, 6)
    one, two = factors(W, rank=2, seed=1), factors(W, rank=2, seed=2)
    assert torch.equal(one.A, two.A)
    assert torch.equal(one.B, two.B)


def test_global_random_state_neither_shapes_the_factors_nor_moves():
    torch.manual_seed(1)
    before, one = torch.get_rng_state(), factors(weight())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two = factors(weight())
    assert torch.equal(one.A, two.A)
    assert torch.equal(one.B, two.B)


def test_a_whole_run_of_loram_calls_no_svd(spec, tmp_path, monkeypatch):
    for owner, name in SVDS:
        monkeypatch.setattr(owner, name, refuse)
    run(spec(training={"max_steps": 1}), tmp_path, lambda event: None)


def test_no_matrix_of_the_weights_size_is_made():
    m, n, r = 512, 640, 4
    W = weight(m, n).float()
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    with Watch():
        found = factors(W, rank=r)
    assert sizes
    assert max(sizes) <= max(m, n) * r
    sizes.clear()
    with Watch():
        init_report.describe_layer(
            "layer", W, found, Evidence(), s=1.0, lora=Lora(init=DST, r=r, alpha=4.0, use_rslora=False)
        )
    assert max(sizes) <= max(m, n) * r  # nor by what reports on it


@pytest.mark.parametrize("basis", ["random_orthogonal", "gaussian"])
@pytest.mark.parametrize("kind", ["variance", "second_moment"])
def test_ablation_bases_have_the_same_magnitude(basis, kind):
    W = weight()
    found = factors(W, config=LoRAM(method="loram", basis=basis, magnitude=kind))
    product = (found.B @ found.A).double()
    got, of = (product.var(), W.var()) if kind == "variance" else (product.square().mean(), W.square().mean())
    assert float(got / of) == pytest.approx(rank_factor(64, 96, 8), rel=1e-4)


@pytest.mark.parametrize("r", [3, 8, 64])
def test_gain_of_half_the_rank_is_the_papers_ablation(r):
    W = weight()
    found = factors(W, rank=r, config=LoRAM(method="loram", rank_factor="log_half_r"))
    product = (found.B @ found.A).double()
    assert float(product.var() / W.var()) == pytest.approx(math.log(r / 2) / math.log(64), rel=1e-5)


@pytest.mark.parametrize("method", ["pissa", "milora", "olora"])
@pytest.mark.parametrize("kind", ["variance", "second_moment"])
@pytest.mark.parametrize("s", [1.0, 2.0])
def test_tracking_takes_the_magnitude_of_another_methods_product(method, kind, s):
    W = weight(mean=0.003)
    config = LoRAM(method="loram", tracking=method, magnitude=kind)
    found = factors(W.float(), scale=s, config=config)
    generator = torch.Generator().manual_seed(0)
    reference = METHODS[method](
        W.float(),
        Evidence(),
        rank=8,
        scale=s,
        config=INITS[method].model_validate({"method": method}),
        generator=generator,
    )

    def size(pair):
        product = (pair.B @ pair.A).double()
        return float(product.var() if kind == "variance" else product.square().mean())

    assert size(found) == pytest.approx(size(reference), rel=1e-4)
    assert torch.allclose(found.A @ found.A.T, found.B.T @ found.B, rtol=1e-4, atol=1e-6)  # still its own directions


@pytest.mark.parametrize(
    ("init", "field"),
    [
        ({"tracking": "pissa", "scale_aware": True}, "scale_aware"),
        ({"tracking": "pissa", "rank_factor": "log_half_r"}, "rank_factor"),
    ],
)
def test_a_gain_on_top_of_tracking_is_refused(init, field):
    with pytest.raises(ValidationError, match=f"{field} does not combine"):
        Lora.model_validate({"init": {"method": "loram", **init}})


@pytest.mark.parametrize(("init", "r"), [({}, 1), ({"rank_factor": "log_half_r"}, 2)])
def test_a_rank_with_a_gain_of_zero_is_refused_in_the_schema(init, r):
    with pytest.raises(ValidationError, match="needs a rank of at least"):
        Lora.model_validate({"init": {"method": "loram", **init}, "r": r})


def test_conv1d_is_the_same_start_as_linear():
    """`Conv1D` stores in×out and hands over the transposed view."""
    W = weight().float()
    one, two = factors(W), factors(W.T.contiguous().T)
    assert torch.allclose(one.A, two.A, rtol=1e-6)
    assert torch.allclose(one.B, two.B, rtol=1e-6)


@pytest.mark.parametrize(
    ("W", "rank", "text"),
    [
        (weight(), 1, "2 <= r"),
        (weight(), 65, "2 <= r <= 64"),
        (weight(1, 9), 2, "2 <= r"),
        (torch.ones(8, 9), 2, "equal"),
    ],
)
def test_what_loram_cannot_do_is_refused(W, rank, text):
    with pytest.raises(UnsupportedInit, match=text):
        factors(W, rank=rank)
