"""The mathematics behind HRP on matrix factorization, L(A, B) = ½‖B·A - M‖², float64, batches of draws.

M is 40×48 and diagonal, which costs nothing in generality where A' is Haar distributed. "Asymmetric"
freezes A; "classic" trains both factors. Expectations are compared within four standard errors.
"""

from itertools import pairwise

import pytest
import torch

from lorainit.init.methods.hrp import right_directions

F64 = torch.float64
m, n, r = 40, 48, 4
index = torch.arange(m, dtype=F64)
SPECTRA = {
    "harmonic": 1 / (index + 1),
    "rank 4": torch.cat([torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=F64), torch.zeros(m - 4, dtype=F64)]),
    "geometric": 0.8**index,
    "flat": torch.ones(m, dtype=F64),
}
# Best possible, random A (closed form), then HRP at R = 8, 16, 32, 48.
TABLE = {
    "harmonic": (0.0983, 0.7426, 0.685, 0.565, 0.333, 0.0983),
    "rank 4": (0.0, 13.75, 12.52, 10.00, 5.01, 0.0),
    "geometric": (0.233, 1.2731, 1.173, 0.981, 0.609, 0.233),
    "flat": (18.0, 18.3333, 18.077, 18.000, 18.000, 18.0),
}
# The table's own standard error and rounding.
TABLE_ERROR = {"harmonic": 0.002, "rank 4": 0.03, "geometric": 0.002, "flat": 0.002}
RANKS = (8, 16, 32, 48)


def matrix(spectrum):
    return torch.cat([torch.diag(SPECTRA[spectrum]), torch.zeros(m, n - m, dtype=F64)], dim=1)


def haar(draws, R, seed=0):
    """`draws` orthonormal n×R frames."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(draws, n, R, generator=generator, dtype=F64)).Q


def best(spectrum):
    return float(SPECTRA[spectrum][r:].square().sum() / 2)


def squares(spectrum):
    return float(SPECTRA[spectrum].square().sum())


def hrp_losses(spectrum, R, draws):
    """½(‖M‖² - sum of the r largest σ_i(M·P')²) for `draws` projectors P' of rank R."""
    MQ = SPECTRA[spectrum][:, None] * haar(draws, R)[:, :m]
    S = torch.linalg.eigvalsh(MQ.mT @ MQ)
    return (squares(spectrum) - S[:, -r:].sum(1)) / 2


def frozen_loss(M, V):
    """½(‖M‖² - ‖M·V‖²): what is left when A = Vᵀ (rows orthonormal, draws×r×n) is frozen and B trained."""
    return (M.square().sum() - (M @ V.mT).square().sum((-2, -1))) / 2


def standard_error(values):
    return float(values.std() / len(values) ** 0.5)


def descend(M, A, B, *, step, counts, classic):
    """Gradient descent on L; the pair at each number of steps in `counts`."""
    A, B, found = A.clone(), B.clone(), {}
    for k in range(1, max(counts) + 1):
        E = B @ A - M
        B_next = B - step * E @ A.mT
        A = A - step * B.mT @ E if classic else A
        B = B_next
        if k in counts:
            found[k] = (A, B)
    return found


def top(A, B):
    """Leading r right singular vectors of each product, draws×r×n."""
    return torch.stack([right_directions(a, b)[1][:r] for a, b in zip(A, B, strict=True)])


# --- expectations ------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("column", "R"), list(enumerate(RANKS)))
def test_expected_losses_are_those_of_the_table(spectrum, column, R):
    losses = hrp_losses(spectrum, R, draws=400)
    error = (standard_error(losses) ** 2 + TABLE_ERROR[spectrum] ** 2) ** 0.5
    assert float(losses.mean()) == pytest.approx(TABLE[spectrum][2 + column], abs=4 * error)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_best_and_random_losses_have_closed_forms(spectrum):
    assert best(spectrum) == pytest.approx(TABLE[spectrum][0], abs=6e-4)
    expected = (1 - r / n) * squares(spectrum) / 2
    assert expected == pytest.approx(TABLE[spectrum][1], abs=6e-5)
    losses = frozen_loss(matrix(spectrum), haar(1000, r).mT)
    assert float(losses.mean()) == pytest.approx(expected, abs=4 * standard_error(losses))


@pytest.mark.parametrize(
    ("spectrum", "bounds"),
    [("harmonic", (0.6915, 0.5729, 0.3356, 0.0983)), ("geometric", (1.196, 1.004, 0.618, 0.233))],
)
def test_upper_bounds_are_those_of_the_table(spectrum, bounds):
    energy = float(SPECTRA[spectrum][:r].square().sum())
    found = [(squares(spectrum) - R / n * energy) / 2 for R in RANKS]
    assert found == pytest.approx(bounds, abs=6e-4)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_preheating_is_never_worse_than_random_and_gains_with_its_rank(spectrum):
    means = [float(hrp_losses(spectrum, R, draws=200).mean()) for R in (r, *RANKS)]
    slack = 1e-9 + 4 * standard_error(hrp_losses(spectrum, r, draws=200))
    assert all(b <= a + slack for a, b in pairwise(means))
    energy = float(SPECTRA[spectrum][:r].square().sum())
    for R, mean in zip((r, *RANKS), means, strict=True):
        assert mean >= best(spectrum) - 1e-9
        assert 2 * mean <= (1 - r / n) * squares(spectrum) + 2 * slack
        assert 2 * mean <= squares(spectrum) - R / n * energy + 2 * slack


def test_low_rank_target_has_an_exact_expectation():
    for R in RANKS:
        losses = hrp_losses("rank 4", R, draws=1000)
        exact = (1 - R / n) * squares("rank 4") / 2
        assert float(losses.mean()) == pytest.approx(exact, abs=4 * standard_error(losses) + 1e-9)


def test_rank_n_gives_the_best_loss_and_rank_r_the_random_law():
    for spectrum in SPECTRA:
        assert torch.allclose(hrp_losses(spectrum, n, 3), torch.tensor(best(spectrum), dtype=F64), atol=1e-12)
        losses = hrp_losses(spectrum, r, draws=1000)
        expected = (1 - r / n) * squares(spectrum) / 2
        assert float(losses.mean()) == pytest.approx(expected, abs=4 * standard_error(losses))


def test_method_on_the_preheated_product_reaches_the_formula():
    """Draw by draw: asymmetric preheating to the end, our directions, asymmetric main run to the end."""
    M = matrix("harmonic")
    Q = haar(5, 16)
    V = top(Q.mT, M @ Q)
    assert torch.allclose(frozen_loss(M, V), hrp_losses("harmonic", 16, 5), atol=1e-12)


# --- dynamics ----------------------------------------------------------------------------------


def test_frozen_preheat_has_its_directions_after_one_step():
    M, A = matrix("harmonic"), 0.7 * haar(1, 16)[0].mT
    counts = (1, 3, 40)
    pairs = descend(M, A, torch.zeros(m, 16, dtype=F64), step=0.1, counts=counts, classic=False)
    P = A.mT @ A / 0.49
    for k, (_, B) in pairs.items():
        factor = 1 - (1 - 0.1 * 0.49) ** k
        assert torch.allclose(B @ A, factor * M @ P, atol=1e-13)
    first, *others = (right_directions(A, B)[1][:r] for _, B in pairs.values())
    for V in others:
        assert (first.mT @ first - V.mT @ V).abs().max() < 1e-12


def test_wise_start_with_frozen_a_closes_its_gap_exponentially():
    M = matrix("harmonic")
    A = 0.8 * torch.eye(n, dtype=F64)[:r]
    energy = float(SPECTRA["harmonic"][:r].square().sum())
    for k, (_, B) in descend(M, A, torch.zeros(m, r, dtype=F64), step=0.05, counts=(7, 30), classic=False).items():
        gap = float((B @ A - M).square().sum() / 2) - best("harmonic")
        assert gap == pytest.approx((1 - 0.05 * 0.64) ** (2 * k) * energy / 2, rel=1e-9)


def test_wise_classic_run_is_within_the_bound_and_on_the_reference():
    M, c = matrix("harmonic"), 1.0
    A = c * torch.eye(n, dtype=F64)[:r]
    energy = float(SPECTRA["harmonic"][:r].square().sum())
    references = {100: (0.0590, 0.0963), 200: (0.00280, 0.0130), 500: (1.3e-6, 3.2e-5)}
    for k, (A_k, B_k) in descend(
        M, A, torch.zeros(m, r, dtype=F64), step=0.01, counts=references, classic=True
    ).items():
        gap = float((B_k @ A_k - M).square().sum() / 2) - best("harmonic")
        reference, bound = references[k]
        assert gap == pytest.approx(reference, rel=0.04)  # two digits are given
        exact_bound = float(torch.exp(torch.tensor(-2 * c * c * 0.01 * k, dtype=F64))) * energy / 2
        assert exact_bound == pytest.approx(bound, rel=0.02)
        assert 0 <= gap <= exact_bound


def test_direction_absent_from_a_is_never_learned():
    M = matrix("harmonic")
    A = torch.eye(n, dtype=F64)[[0, 1, 2, 5]]
    for A_k, B_k in descend(M, A, torch.zeros(m, r, dtype=F64), step=0.1, counts=(500,), classic=True).values():
        product = B_k @ A_k
        assert product[3, 3] == 0
        assert float(product[5, 5]) == pytest.approx(1 / 6, rel=1e-3)


DETAILS = {
    ("orthonormal", False, 16): (0.571, 0.571, 0.571, 0.571),
    ("orthonormal", False, 32): (0.341, 0.341, 0.341, 0.341),
    ("orthonormal", True, 16): (0.571, 0.496, 0.183, 0.110),
    ("orthonormal", True, 32): (0.341, 0.275, 0.128, 0.101),
    ("kaiming", False, 16): (0.617, 0.605, 0.577, 0.561),
    ("kaiming", False, 32): (0.507, 0.478, 0.403, 0.347),
    ("kaiming", True, 16): (0.617, 0.523, 0.162, 0.099),
    ("kaiming", True, 32): (0.507, 0.388, 0.126, 0.099),
}


def preheat_start(law, R, draws=20):
    if law == "orthonormal":
        return haar(draws, R, seed=R).mT
    generator = torch.Generator().manual_seed(R)
    return (2 * torch.rand(draws, R, n, generator=generator, dtype=F64) - 1) / n**0.5


@pytest.mark.parametrize(("law", "classic", "R"), DETAILS)
def test_length_and_law_of_the_preheat_act_as_in_the_table(law, classic, R):
    M, A = matrix("harmonic"), preheat_start(law, R)
    counts = (1, 10, 50, 200)
    pairs = descend(M, A, torch.zeros(20, m, R, dtype=F64), step=0.1, counts=counts, classic=classic)
    for k, reference in zip(counts, DETAILS[law, classic, R], strict=True):
        values = frozen_loss(M, top(*pairs[k]))
        # Two means of twenty draws each, and a table of three digits.
        assert float(values.mean()) == pytest.approx(reference, abs=4 * 2**0.5 * standard_error(values) + 1e-3)


@pytest.mark.parametrize(
    ("R", "reference"),
    [
        (None, (0.38, 0.25, 0.19, 0.145)),
        (4, (0.455, 0.267, 0.204, 0.146)),
        (16, (0.236, 0.161, 0.128, 0.109)),
        (32, (0.149, 0.120, 0.107, 0.101)),
    ],
    ids=["random", "R=r", "R=16", "R=32"],
)
def test_preheating_pays_for_its_own_steps(R, reference):
    M, zero = matrix("harmonic"), torch.zeros(20, m, r, dtype=F64)
    A, spent = haar(20, r, seed=5).mT, 0
    if R is not None:
        start = haar(20, R, seed=R).mT
        A = top(*descend(M, start, torch.zeros(20, m, R, dtype=F64), step=0.1, counts=(20,), classic=True)[20])
        spent = 20
    counts = [total - spent for total in (40, 70, 120, 220)]
    pairs = descend(M, A, zero, step=0.1, counts=counts, classic=True)
    for k, wanted in zip(counts, reference, strict=True):
        A_k, B_k = pairs[k]
        values = (B_k @ A_k - M).square().sum((-2, -1)) / 2
        assert float(values.mean()) == pytest.approx(wanted, abs=4 * 2**0.5 * standard_error(values) + 5e-3)
