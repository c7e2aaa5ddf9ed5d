"""CorDA: what it splits off is W's own, weighed by the inputs, and inverses are checked."""

import json
import math

import pytest
import torch

from lorainit.config.errors import InitFailed
from lorainit.config.inits.data import CorDA
from lorainit.config.inits.weights import PiSSA
from lorainit.init.evidence import Evidence
from lorainit.init.methods import METHODS
from lorainit.init.methods.corda import damp
from lorainit.run import run

MODES = ["ipm", "kpm"]
SCALES = [0.25, 1.0, 2.0, math.sqrt(8)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weight(m=48, n=64, seed=0):
    return torch.randn(m, n, generator=generator(seed)) / n**0.5


def second_moment(n=64, tokens=500, seed=1):
    """Of inputs whose standard deviations fall like 1/i in random directions."""
    g = generator(seed)
    V = torch.linalg.qr(torch.randn(n, n, generator=g)).Q
    X = torch.randn(tokens, n, generator=g) / torch.arange(1.0, n + 1) @ V.T
    return X.T @ X / tokens


def start(W, C, rank=8, scale=1.0, **options):
    config = CorDA(method="corda", **options)
    evidence = Evidence(second_moment=C)
    return METHODS["corda"](W, evidence, rank=rank, scale=scale, config=config, generator=generator())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
@pytest.mark.parametrize("scale", SCALES)
def test_all_triples_together_are_the_weight(mode, shape, scale):
    W = weight(*shape)
    found = start(W, second_moment(shape[1]), rank=48, scale=scale, mode=mode)
    tolerance = 1e-4 if mode == "ipm" else 1e-5
    assert (scale * found.B @ found.A - W).abs().max() < tolerance


def test_identity_holds_to_rounding_in_double_precision():
    W, C = weight().double(), second_moment().double()
    damped, inverse, _ = damp(C)
    U, S, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
    assert (U @ torch.diag(S) @ Vh @ inverse - W).abs().max() < 1e-12


@pytest.mark.parametrize("scale", SCALES)
def test_ipm_takes_what_the_inputs_see_most_of_and_kpm_the_least(scale):
    W, C = weight(), second_moment()
    damped = damp(C)[0]
    S = torch.linalg.svdvals(W @ damped)

    def energy(found):
        return float(torch.linalg.norm(scale * found.B @ found.A @ damped) ** 2)

    assert energy(start(W, C, scale=scale)) == pytest.approx(float(S[:8].square().sum()), rel=1e-4)
    assert energy(start(W, C, scale=scale, mode="kpm")) == pytest.approx(float(S[-8:].square().sum()), rel=1e-3)


def test_ipm_leaves_less_of_w_times_c_than_pissa():
    W, C = weight(), second_moment()
    damped = damp(C)[0]

    def left(found):
        return float(torch.linalg.norm((W - found.B @ found.A) @ damped))

    pissa = METHODS["pissa"](
        W, Evidence(), rank=8, scale=1.0, config=PiSSA(method="pissa", niter=None), generator=generator()
    )
    best = float(torch.linalg.svdvals(W @ damped)[8:].square().sum().sqrt())
    assert left(start(W, C)) == pytest.approx(best, rel=1e-4)
    assert left(start(W, C)) < 0.6 * left(pissa)


@pytest.mark.parametrize("mode", MODES)
def test_authors_factors_are_the_evenly_split_triples_and_a_is_not_orthonormal(mode):
    W, C, s = weight().double(), second_moment().double(), 2.0
    damped, inverse, _ = damp(C)
    _, S, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
    part = slice(None, 8) if mode == "ipm" else slice(-8, None)
    found = start(weight(), second_moment(), scale=s, mode=mode, balance="authors")
    gram = found.B.T @ found.B
    assert torch.allclose(gram.double(), torch.diag(S[part] / s), atol=1e-5)
    A = (S[part] / s).sqrt()[:, None] * (Vh[part] @ inverse)
    assert torch.allclose(found.A.double().norm(dim=1), A.norm(dim=1), rtol=1e-3)
    assert (found.A @ found.A.T / gram.diagonal() - torch.eye(8)).abs().max() > 0.1
    assert (found.A.dtype, found.B.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", SCALES)
def test_equal_norms_are_equal_and_the_product_is_the_authors(mode, scale):
    W, C = weight(), second_moment()
    ours, theirs = (start(W, C, scale=scale, mode=mode, balance=b) for b in ("equal", "authors"))
    assert float(ours.A.norm()) == pytest.approx(float(ours.B.norm()), rel=1e-5)
    assert float(theirs.A.norm()) != pytest.approx(float(theirs.B.norm()), rel=0.1)
    assert torch.allclose(ours.B @ ours.A, theirs.B @ theirs.A, atol=1e-6)


@pytest.mark.parametrize("size", [1e-6, 1 / 64, 100.0, 1e6])
def test_size_of_the_moment_moves_the_authors_balance_and_not_ours(size):
    """c times the inputs: c² times the moment, B c times as large and A c times smaller."""
    W, C = weight(), second_moment()
    ours, theirs = (start(W, size * C, balance=b) for b in ("equal", "authors"))
    plain, published = (start(W, C, balance=b) for b in ("equal", "authors"))
    assert torch.allclose(ours.A.abs(), plain.A.abs(), rtol=1e-2, atol=1e-4)
    assert float(theirs.B.norm()) == pytest.approx(size**0.5 * float(published.B.norm()), rel=1e-3)
    assert float(theirs.A.norm()) == pytest.approx(size**-0.5 * float(published.A.norm()), rel=1e-3)


def test_damping_starts_at_one_per_cent_and_is_recorded():
    C = second_moment()
    damped, inverse, found = damp(C)
    assert found == 0.01
    assert torch.allclose(damped, C + 0.01 * C.diagonal().mean() * torch.eye(64))
    assert (damped @ inverse - torch.eye(64)).norm() < 0.05
    assert start(weight(), C).facts == {"damping": 0.01}


def test_damping_doubles_until_the_inverse_is_one(monkeypatch):
    C = second_moment()
    errors = []
    for k in range(7):
        candidate = C + 0.01 * 2**k * C.diagonal().mean() * torch.eye(64)
        errors.append(float((candidate @ torch.linalg.inv(candidate) - torch.eye(64)).norm()))
    monkeypatch.setitem(damp.__globals__, "INVERSE_ERROR", 1.001 * min(errors[:4]))
    assert damp(C)[2] == pytest.approx(0.01 * 2 ** errors.index(min(errors[:4])))
    monkeypatch.setitem(damp.__globals__, "INVERSE_ERROR", 0.0)
    with pytest.raises(InitFailed, match="even with damping 1"):
        damp(C)


def test_fewer_tokens_than_inputs_are_handled_by_the_damping():
    W = weight()
    found = start(W, second_moment(tokens=5), rank=4)
    assert found.A.isfinite().all()
    assert float((found.B @ found.A).norm()) > 0.1 * float(W.norm()) / 4


@pytest.mark.parametrize("C", [torch.zeros(8, 8), torch.full((8, 8), math.nan)])
def test_moment_that_no_damping_inverts_is_refused(C):
    with pytest.raises(InitFailed, match="cannot be inverted"):
        damp(C)


def test_missing_moment_is_refused():
    with pytest.raises(InitFailed, match="none was collected"):
        start(weight(), None)


def test_kpm_passes_over_directions_that_the_weight_does_not_have():
    W = weight()
    W[-1] = W[0]
    found = start(W, second_moment(), mode="kpm")
    assert torch.linalg.svdvals(found.B)[-1] > 1e-3
    assert torch.linalg.svdvals(found.A)[-1] > 1e-3


def test_kpm_refuses_a_weight_with_fewer_directions_than_the_rank_and_ipm_does_not_mind():
    W = weight()
    W[5:] = 0
    with pytest.raises(InitFailed, match="leave nothing to learn"):
        start(W, second_moment(), mode="kpm")
    assert start(W, second_moment()).A.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_run_starts_as_the_base_and_its_export_reloads(spec, tmp_path, base, mode):
    done = run(spec(base, lora={"init": {"method": "corda", "mode": mode}}), tmp_path, lambda event: None)
    report = json.loads((tmp_path / "adapter/init_report.json").read_text())
    assert report["max_abs_logit_difference"] < 1e-4
    assert report["samples"] == 12
    assert {m["damping"] for m in report["per_module"]} == {0.01}
    assert (done.export_check["passed"], done.export_check["export_rank"]) == (True, 8)
