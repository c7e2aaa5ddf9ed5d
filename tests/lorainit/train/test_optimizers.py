"""The optimizers a run may choose: what one step does, and that a resumed run cannot tell."""

import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from torch import nn

from lorainit.config.events import Metrics
from lorainit.config.spec import Hyperparameters
from lorainit.run import run
from lorainit.train.checkpoint import Progress, Restored
from lorainit.train.optimizers import (
    PreconditionedAdamW,
    SimultaneousAdamW,
    SingularPreconditioner,
    make_optimizer,
    set_rate,
)

pytestmark = pytest.mark.usefixtures("training_only")

F64 = torch.float64
OPTIMIZERS = {
    "adamw": {"name": "adamw"},
    "adamw_lora_plus": {"name": "adamw_lora_plus", "ratio": 4.0},
    "adamw_preconditioned": {"name": "adamw_preconditioned", "damping": 1e-4},
    "simultaneous": {"name": "adamw_preconditioned", "damping": 1e-4, "update": "simultaneous"},
}


def pair(r=4, n=12, m=10, seed=0, dtype=F64):
    """(A, B) with gradients of order one."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (nn.Parameter(torch.randn(*s, generator=generator, dtype=dtype)) for s in ((r, n), (m, r)))
    A.grad, B.grad = (torch.randn(*s, generator=generator, dtype=dtype) for s in ((r, n), (m, r)))
    return A, B


def recipe(name, **more):
    return Hyperparameters.model_validate({"learning_rate": 0.01, "optimizer": OPTIMIZERS[name], **more})


def layer(A, B, magnitude=None):
    return SimpleNamespace(A=A, B=B, magnitude=magnitude)


def test_lora_plus_moves_b_ratio_times_as_fast_and_the_schedule_keeps_the_ratio():
    A, B = pair()
    A0, B0 = A.detach().clone(), B.detach().clone()
    optimizer = make_optimizer(recipe("adamw_lora_plus"), {"x": layer(A, B)})
    set_rate(optimizer, 0.002)
    optimizer.step()
    # Adam's first step has the size of the rate in every entry.
    assert torch.allclose((A - A0).abs(), torch.full_like(A, 0.002), rtol=1e-5)
    assert torch.allclose((B - B0).abs(), torch.full_like(B, 0.008), rtol=1e-5)


def test_adamw_is_torchs_own():
    (A, B), (C, D) = pair(), pair()
    ours = make_optimizer(recipe("adamw", weight_decay=0.1), {"x": layer(A, B)})
    theirs = torch.optim.AdamW([C, D], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        ours.step()
        theirs.step()
    assert torch.equal(A, C)
    assert torch.equal(B, D)


# --- the preconditioned AdamW ------------------------------------------------------------------


def by_hand(A, B, g_A, g_B, state, *, rate, damping, decay, sequential=True):
    """The same update written out with inverses; `state` holds (m, v) of A and of B."""
    eye = torch.eye(len(A), dtype=A.dtype)

    def adam(p, g, key):
        m, v = state.get(key, (torch.zeros_like(p), torch.zeros_like(p)))
        state[key] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        return (p - rate * m / (v.sqrt() + 1e-8)) * (1 - rate * decay)

    new = adam(A, torch.linalg.inv(B.T @ B + damping * eye) @ g_A, "A")
    seen = new if sequential else A
    return new, adam(B, g_B @ torch.linalg.inv(seen @ seen.T + damping * eye), "B")


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_preconditioned_steps_are_the_formula_with_the_new_a(decay):
    A, B = pair()
    optimizer = PreconditionedAdamW({"x": (A, B)}, lr=0.01, damping=1e-3, weight_decay=decay)
    X, Y, state = A.detach().clone(), B.detach().clone(), {}
    for _ in range(3):
        X, Y = by_hand(X, Y, A.grad, B.grad, state, rate=0.01, damping=1e-3, decay=decay)
        optimizer.step()
    assert torch.allclose(A, X, rtol=1e-10, atol=1e-12)
    assert torch.allclose(B, Y, rtol=1e-10, atol=1e-12)


def test_b_uses_the_a_that_has_just_moved():
    A, B = pair()
    optimizer = PreconditionedAdamW({"x": (A, B)}, lr=1e-2)
    rules = {"rate": 1e-2, "damping": 1e-6, "decay": 0.0}
    new = old = A.detach().clone(), B.detach().clone()
    new_state, old_state = {}, {}
    for _ in range(3):  # Adam's first step shows signs only
        new = by_hand(*new, A.grad, B.grad, new_state, **rules)
        old = by_hand(*old, A.grad, B.grad, old_state, **rules, sequential=False)
        optimizer.step()
        A.grad, B.grad = A.grad + 0.3, B.grad - 0.2
    assert torch.allclose(B, new[1], rtol=1e-9, atol=1e-10)
    assert (B - old[1]).abs().max() > 1e-5


def test_first_step_is_3_16_times_the_rate():
    A, B = pair()
    A.grad, B.grad = 1000 * A.grad, 1000 * B.grad  # far above Adam's eps in every entry
    A0, B0 = A.detach().clone(), B.detach().clone()
    PreconditionedAdamW({"x": (A, B)}, lr=1e-3).step()
    size = 0.1 / math.sqrt(0.001)
    assert size == pytest.approx(3.1623, abs=1e-4)
    for before, after in ((A0, A), (B0, B)):
        assert torch.allclose((after - before).abs(), torch.full_like(after, size * 1e-3), rtol=1e-4)


def test_pairs_of_different_rank_do_not_disturb_each_other():
    pairs = {str(r): pair(r=r, seed=r) for r in (2, 4, 2)} | {"again": pair(r=4, seed=9)}
    PreconditionedAdamW(pairs, lr=0.01).step()
    for name, (A, B) in pairs.items():
        alone = pair(r=len(A), seed=9 if name == "again" else len(A))
        PreconditionedAdamW({"x": alone}, lr=0.01).step()
        assert torch.equal(A, alone[0])
        assert torch.equal(B, alone[1])


def test_lost_rank_without_damping_is_refused_by_name_and_changes_nothing():
    A, B = pair()
    with torch.no_grad():
        B[:, 1] = 0
    before = A.detach().clone()
    with pytest.raises(SingularPreconditioner, match=r"of model\.q is singular at damping 0: .* lost rank") as caught:
        PreconditionedAdamW({"model.q": (A, B)}, lr=0.01, damping=0.0).step()
    assert caught.value.param == "training.optimizer.damping"
    assert caught.value.code == "non_finite_loss"
    assert torch.equal(A, before)
    PreconditionedAdamW({"model.q": (A, B)}, lr=0.01, damping=1e-6).step()


@pytest.mark.parametrize("kind", [PreconditionedAdamW, SimultaneousAdamW])
def test_directions_that_are_rounding_need_damping(kind):
    """LoRA-One's start where the gradient has rank 4 < r: the surplus directions are the SVD's rounding."""
    A, B = pair(r=6, dtype=torch.float32)
    with torch.no_grad():
        A.copy_(torch.eye(6, 12)), B.copy_(torch.eye(10, 6))
        A[4:] *= 1e-4
        B[:, 4:] *= 1e-4
    with pytest.raises(SingularPreconditioner, match="singular at damping 0"):
        kind({"x": (A, B)}, lr=0.01, damping=0.0, weight_decay=0.0).step()
    kind({"x": (A, B)}, lr=0.01, damping=1e-6, weight_decay=0.0).step()


def test_simultaneous_steps_are_pefts():
    """PEFT's create_riemannian_optimizer over AdamW, at the same damping, on one adapted layer."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 10)), LoraConfig(r=4, target_modules=["0"])).double()
    (a, A), (b, B) = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
    assert ("lora_A" in a, "lora_B" in b) == (True, True)
    C, D = pair()
    with torch.no_grad():
        A.copy_(C), B.copy_(D)
    theirs = create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.01, reg=1e-3, weight_decay=0.1)
    ours = SimultaneousAdamW({"x": (C, D)}, lr=0.01, damping=1e-3, weight_decay=0.1)
    for _ in range(5):
        for p in (C, D):
            p.grad = torch.randn_like(p)
        A.grad, B.grad = C.grad.clone(), D.grad.clone()
        ours.step()
        theirs.step()
    assert torch.allclose(A, C, rtol=1e-10, atol=1e-12)
    assert torch.allclose(B, D, rtol=1e-10, atol=1e-12)


def test_simultaneous_first_step_has_the_size_of_the_rate():
    A, B = pair()
    A0, B0 = A.detach().clone(), B.detach().clone()
    SimultaneousAdamW({"x": (A, B)}, lr=1e-3, damping=1e-6, weight_decay=0.0).step()
    for before, after in ((A0, A), (B0, B)):
        assert torch.allclose((after - before).abs(), torch.full_like(after, 1e-3), rtol=1e-4)


def test_kaiming_start_with_zero_b_is_fine_with_damping():
    A, B = pair(dtype=torch.float32)
    with torch.no_grad():
        B.zero_()
    A.grad.zero_()  # as it is when B = 0
    before = A.detach().clone()
    PreconditionedAdamW({"x": (A, B)}, lr=0.01).step()
    assert torch.equal(A, before)
    assert B.isfinite().all()


@pytest.mark.parametrize("kind", [PreconditionedAdamW, SimultaneousAdamW])
def test_closure_is_refused(kind):
    with pytest.raises(ValueError, match="closures"):
        kind({"x": pair()}, lr=0.01, damping=1e-6, weight_decay=0.0).step(lambda: 0.0)


# --- in a run ----------------------------------------------------------------------------------


class Enough(Exception):
    pass


@pytest.fixture(scope="module")
def ends():
    """What each optimizer's whole run ended with."""
    return {}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_run_ends_with_the_same_bits_and_unlike_the_other_optimizers(spec, tmp_path, ends, name):
    training = {"max_steps": 3, "checkpoint_interval": 1, "optimizer": OPTIMIZERS[name], "weight_decay": 0.01}
    options = {"lora": {"init": "kaiming", "target_modules": ["v_proj"]}, "training": training}
    file = "adapter/adapter_model.safetensors"

    def stop(event):
        if isinstance(event, Metrics) and event.step == 2:
            raise Enough

    run(spec(**options), tmp_path / "whole", lambda event: None)
    with pytest.raises(Enough):
        run(spec(**options), tmp_path / "cut", stop)
    point = str(tmp_path / "cut/checkpoints/step-000001")
    run(spec(**options, resume_from=point), tmp_path / "resumed", lambda event: None)
    ends[name] = (tmp_path / "whole" / file).read_bytes()
    assert (tmp_path / "resumed" / file).read_bytes() == ends[name]
    assert len(set(ends.values())) == len(ends)


# --- on another device -----------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_state_lies_where_torchs_own_loader_puts_it(tmp_path, name, dora):
    """Fused AdamW reads `step` on the device; on a GPU, one that lies on the host is an illegal address."""

    def made(device):
        A, B = (nn.Parameter(p.detach().to(device)) for p in pair(dtype=torch.float32))
        one = layer(A, B, nn.Parameter(torch.ones(10, device=device)) if dora else None)
        one.trained_parameters = lambda: {k: p for k, p in vars(one).items() if isinstance(p, nn.Parameter)}
        return {"x": one}, make_optimizer(recipe(name), {"x": one})

    layers, optimizer = made("cpu")
    for p in layers["x"].trained_parameters().values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = {
        f"optimizer.{moment}.x.{key}": value
        for key, p in layers["x"].trained_parameters().items()
        for moment, value in optimizer.state[p].items()
    }
    there, ours = made("meta")
    Restored(tmp_path, Progress(1, 0, 0.0), kept, {}, []).restore(there, ours)
    for key, p in there["x"].trained_parameters().items():
        group = next(g for g in ours.param_groups if any(q is p for q in g["params"]))
        for moment, value in ours.state[p].items():
            theirs = torch.optim.Optimizer._process_value_according_to_param_policy(
                p, kept[f"optimizer.{moment}.x.{key}"], 0, [{**group, "params": [0]}], moment
            )
            assert (moment, value.device, value.dtype) == (moment, theirs.device, theirs.dtype)
