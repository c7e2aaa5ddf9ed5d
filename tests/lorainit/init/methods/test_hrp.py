"""HRP on layers and on a tiny model: preheating, directions, refusals. Its theory is in test_hrp_theory."""

import gc
import json
import math
import weakref
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from lorainit.config.errors import InitFailed, NonFiniteLoss, UnsupportedInit
from lorainit.config.events import Message, Tick
from lorainit.config.inits.data import HRP
from lorainit.data.batches import collate
from lorainit.init.collectors import preheat as module
from lorainit.init.collectors.collect import collect
from lorainit.init.collectors.preheat import preheat_steps
from lorainit.init.evidence import Evidence
from lorainit.init.initialize import initialize
from lorainit.init.methods import METHODS
from lorainit.init.methods.hrp import right_directions
from lorainit.model.forward.loss import sum_losses
from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import LoRALinear, attach_temporarily
from lorainit.run import run
from lorainit.runtime.devices import make_generator
from tests.lorainit.contexts import make_context, state

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(m=40, n=48, R=16, dtype=F64, seed=0):
    """A preheated pair (A' R×n, B' m×R)."""
    g = generator(seed)
    return torch.randn(R, n, generator=g, dtype=dtype), torch.randn(m, R, generator=g, dtype=dtype)


def start(A, B, r=4, scale=1.0, **options):
    config = HRP(method="hrp", **options)
    weight = torch.zeros(B.shape[0], A.shape[1])
    return METHODS["hrp"](weight, Evidence(preheated=(A, B)), rank=r, scale=scale, config=config, generator=generator())


def projector(V):
    return V.T @ V


# --- the factors -------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-10)])
@pytest.mark.parametrize("shape", [(40, 48), (48, 40)])
def test_directions_are_those_of_the_dense_decomposition(dtype, tolerance, shape):
    A, B = pair(*shape, dtype=dtype)
    S, V = right_directions(A, B)
    _, dense, Vh = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
    assert (projector(V[:4].double()) - projector(Vh[:4])).abs().max() < tolerance
    assert torch.allclose(S.double(), dense[:16], rtol=1e-5)


@pytest.mark.parametrize("c", [1.0, 1 / math.sqrt(3), 2.0])
def test_rows_of_a_are_orthogonal_of_length_c_and_the_product_is_zero(c):
    found = start(*pair(dtype=torch.float32), c=c)
    assert (found.A @ found.A.T - c * c * torch.eye(4)).abs().max() < 1e-6 * max(1, c * c)
    assert not found.B.any()
    assert (found.A.shape, found.B.shape, found.A.dtype) == ((4, 48), (40, 4), torch.float32)


def test_directions_lie_in_the_span_of_a_frozen_a_and_do_not_depend_on_the_scale():
    A, B = pair()
    V = right_directions(A, B)[1][:4]
    Q = torch.linalg.qr(A.T).Q
    assert (V - V @ Q @ Q.T).abs().max() < 1e-12
    assert (projector(V) - projector(right_directions(A, 7 * B)[1][:4])).abs().max() < 1e-12
    assert torch.equal(start(A, B, scale=0.25).A, start(A, B, scale=8.0).A)


def test_method_never_forms_the_product(monkeypatch):
    sizes = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda X, **k: sizes.append(tuple(X.shape)) or svd(X, **k))
    start(*pair(400, 300, 8))
    assert sizes == [(8, 8)]


@pytest.mark.parametrize("rank", [0, 3])
def test_rank_deficient_preheat_is_refused_with_its_numerical_rank(rank):
    A, B = pair()
    B[:, rank:] = 0
    with pytest.raises(InitFailed, match=rf"has {rank} directions .* fewer than r = 4"):
        start(A, B)


def test_preheat_that_is_not_finite_or_missing_is_refused():
    A, B = pair()
    with pytest.raises(InitFailed, match="none was collected"):
        METHODS["hrp"](
            torch.zeros(4, 4), Evidence(), rank=1, scale=1.0, config=HRP(method="hrp"), generator=generator()
        )
    B[0, 0] = math.nan
    with pytest.raises(InitFailed, match="non-finite"):
        start(A, B)


@pytest.mark.parametrize("c", [1.0, 0.5])
def test_left_side_starts_b_in_the_left_singular_vectors(c):
    A, B = pair()
    found = start(A, B, side="left", c=c)
    U = torch.linalg.svd(B @ A).U[:, :4]
    assert not found.A.any()
    assert (found.A.shape, found.B.shape) == ((4, 48), (40, 4))
    assert (found.B.double() @ found.B.double().T - c * c * U @ U.T).abs().max() < 1e-6


@pytest.mark.parametrize("c", [1.0, 0.5])
@pytest.mark.parametrize("s", [1.0, 2.0])
def test_carried_start_is_the_best_part_of_the_preheated_product(c, s):
    A, B = pair()
    found = start(A, B, scale=s, b_init="carry", c=c)
    U, S, Vh = torch.linalg.svd(s * B @ A)
    best = (U[:, :4] * S[:4]) @ Vh[:4]
    assert torch.allclose(s * found.B.double() @ found.A.double(), best, atol=1e-5 * float(S[0]))
    assert torch.equal(found.A, start(A, B, c=c).A)
    assert HRP(method="hrp", b_init="carry").function_preserving is False


def test_carrying_does_not_combine_with_the_left_side():
    with pytest.raises(ValidationError, match="starts A at zero"):
        HRP(method="hrp", side="left", b_init="carry")


@pytest.mark.parametrize("alive", [0, 3])
@pytest.mark.parametrize("side", ["right", "left"])
def test_missing_directions_are_completed_when_asked_for(alive, side):
    A, B = pair(seed=1)  # not the seed of the directions that are drawn
    B[:, alive:] = 0
    found = start(A, B, side=side, complete="random_orthonormal")
    V = found.A if side == "right" else found.B.T
    assert torch.allclose(V @ V.T, torch.eye(4), atol=1e-6)
    U, _, Vh = torch.linalg.svd(B @ A)
    known = (Vh if side == "right" else U.T)[:alive].float()
    assert torch.allclose(known @ V.T @ V, known, atol=1e-5)
    assert found.facts["completed"] == 4 - alive
    assert torch.equal(found.A, start(A, B, side=side, complete="random_orthonormal").A)


# --- preheating --------------------------------------------------------------------------------


def hrp_context(bases, rows, base="llama", total=4, on_event=None, **options):
    context_options = {k: options.pop(k) for k in ("r", "learning_rate", "wanted", "size") if k in options}
    return make_context(
        bases[base], rows, {"method": "hrp", **options}, total=total, on_event=on_event, **context_options
    )


def heat(context):
    return collect(context.lora.method, context)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_preheating_leaves_the_model_and_the_generator_as_they_were(bases, rows, base):
    context = hrp_context(bases, rows, base)
    before, chance = state(context.model), torch.get_rng_state()
    one = heat(context)
    assert state(context.model) == before
    assert torch.equal(torch.get_rng_state(), chance)
    two = heat(context)
    assert all(torch.equal(a, b) for n in one for a, b in zip(one[n].preheated, two[n].preheated, strict=True))


def test_model_comes_back_when_preheating_fails(bases, rows):
    def stop(event):
        if isinstance(event, Tick) and event.done == 2:
            raise KeyboardInterrupt

    context = hrp_context(bases, rows, on_event=stop)
    before = state(context.model)
    with pytest.raises(KeyboardInterrupt):
        heat(context)
    assert state(context.model) == before


def test_transient_memory_is_released(bases, rows, monkeypatch):
    alive = []

    class Watched(LoRALinear):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            alive.append(weakref.ref(self))

    optimizers = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(module, "LoRALinear", Watched)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: optimizers.append(o := adamw(*a, **k)) or o)
    evidence = heat(hrp_context(bases, rows))
    (optimizer,) = (weakref.ref(o) for o in optimizers)
    optimizers.clear()
    gc.collect()
    assert optimizer() is None
    assert len(alive) == 14 and not any(ref() for ref in alive)
    assert all(not t.requires_grad and t.grad is None for e in evidence.values() for t in e.preheated)


def test_progress_and_loss_are_events_and_the_loss_falls(bases, rows, monkeypatch):
    monkeypatch.setattr(module, "SAY_SECONDS", math.inf)
    events = []
    heat(hrp_context(bases, rows, preheat_steps=12, learning_rate=5e-3, on_event=events.append))
    said = [e.data for e in events if isinstance(e, Message)]
    assert [d["step"] for d in said] == [1, 10, 12]
    assert {(d["kind"], d["steps"]) for d in said} == {("init", 12)}
    assert said[-1]["loss"] < said[0]["loss"] - 0.3
    ticks = [(e.done, e.total) for e in events if isinstance(e, Tick)]
    assert ticks == [(i, 12) for i in range(1, 13)]


def test_frozen_a_stays_and_classic_a_moves(bases, rows):
    context = hrp_context(bases, rows, preheat_mode="freeze_a", preheat_rank=8)
    frozen = heat(context)
    name = "model.layers.1.mlp.down_proj"
    A = frozen[name].preheated[0]
    assert torch.allclose(A @ A.T, torch.eye(8), atol=1e-6)
    classic = heat(hrp_context(bases, rows, preheat_rank=8))[name].preheated[0]
    assert not torch.equal(A, classic)
    facts = frozen[name].facts
    assert facts["preheat_rank"] == 8
    assert facts["preheat"]["first_loss"] > facts["preheat"]["last_loss"]


def test_kaiming_law_has_kaimings_entries(bases, rows):
    found = heat(hrp_context(bases, rows, preheat_mode="freeze_a", preheat_a_law="kaiming"))
    A = found["model.layers.0.mlp.down_proj"].preheated[0]
    assert A.shape == (32, 48)
    assert A.abs().max() <= 48**-0.5
    assert float(A.var()) * 3 * 48 == pytest.approx(1, rel=0.1)


def test_modules_get_streams_of_their_own_and_the_methods_seed_wins(bases, rows):
    def frozen(name, **options):
        found = heat(hrp_context(bases, rows, preheat_mode="freeze_a", preheat_steps=1, **options))
        return found[f"model.layers.{name}"].preheated[0]

    q = "0.self_attn.q_proj"
    assert torch.equal(frozen(q), frozen(q, wanted=["q_proj"]))
    assert not torch.equal(frozen(q), frozen("1.self_attn.q_proj"))
    assert not torch.equal(frozen(q), frozen(q, seed=8))


def test_micro_batches_do_not_change_the_preheat(bases, rows):
    name = "model.layers.1.self_attn.v_proj"
    options = {"preheat_mode": "freeze_a", "preheat_steps": 1}
    one, two = (heat(hrp_context(bases, rows, size=size, **options))[name] for size in (5, 2))
    assert torch.allclose(one.preheated[1], two.preheated[1], atol=2e-5)


@pytest.mark.parametrize(
    ("total", "steps"), [(4, 4), (20, 20), (100, 20), (1500, 30), (50_000, 200)], ids=lambda value: str(value)
)
def test_auto_steps_are_two_per_cent_within_bounds_and_never_more_than_the_run(total, steps):
    assert preheat_steps(HRP(method="hrp"), total=total) == steps
    assert preheat_steps(HRP(method="hrp", preheat_steps=7), total=total) == 7


def test_auto_rank_is_eight_times_r_within_the_layer(bases, rows):
    ranks = {e.facts["preheat_rank"] for e in heat(hrp_context(bases, rows, r=2)).values()}
    assert ranks == {16}
    assert heat(hrp_context(bases, rows))["model.layers.0.self_attn.k_proj"].facts["preheat_rank"] == 16


@pytest.mark.parametrize("rank", [3, 17])
def test_preheat_rank_outside_r_and_the_smaller_side_is_refused_by_name(bases, rows, rank):
    with pytest.raises(UnsupportedInit, match=rf"proj: preheat_rank {rank} must lie between r = 4 and"):
        heat(hrp_context(bases, rows, preheat_rank=rank))


def test_preheat_rank_equal_to_r_is_warned_about(bases, rows):
    events = []
    heat(hrp_context(bases, rows, preheat_rank=4, on_event=events.append))
    assert any(isinstance(e, Message) and e.level == "warn" and "no gain" in e.message for e in events)


def test_preheat_that_diverges_is_an_error(bases, rows):
    context = hrp_context(bases, rows)
    context.model.get_submodule("model.norm").weight.data[0] = math.inf
    with pytest.raises(NonFiniteLoss, match="Preheat step 1"):
        heat(context)


def test_one_sgd_step_is_the_projected_gradient(bases, rows):
    """∂L/∂A' = 0 exactly, ∂L/∂B' = s'·G·A', and V_r that of G·A'·A'ᵀ."""
    context = hrp_context(bases, rows)
    name, s = "model.layers.1.mlp.down_proj", 0.5
    target = context.targets[name]
    A = torch.linalg.qr(torch.randn(48, 16, generator=make_generator(0, name))).Q.T.contiguous()
    layer = LoRALinear(target, Factors(A=A, B=torch.zeros(32, 16)), scale=s, subtract=False)
    batch = collate(context.samples[:4], pad=0)
    with attach_temporarily(context.model, {name: layer}):
        sum_losses(context.model, batch).loss.backward()
    target.weight.requires_grad_()
    sum_losses(context.model, batch).loss.backward()
    G = target.weight.grad
    assert not layer.A.grad.any()
    assert torch.allclose(layer.B.grad, s * G @ A.T, rtol=1e-4, atol=1e-5)
    _, V = right_directions(A, -0.1 * layer.B.grad)
    wanted = torch.linalg.svd(G.double() @ A.T.double() @ A.double(), full_matrices=False).Vh[:4]
    assert (projector(V[:4].double()) - projector(wanted)).abs().max() < 1e-5


def test_preheat_that_learned_nothing_is_refused_naming_the_module(bases, rows):
    evidence = heat(hrp_context(bases, rows, preheat_steps=1, preheat_mode="freeze_a"))
    A, B = evidence["model.layers.0.mlp.up_proj"].preheated
    evidence["model.layers.0.mlp.up_proj"] = Evidence(preheated=(A, torch.zeros_like(B)))
    context = hrp_context(bases, rows)
    probe = collate(context.samples[:2], pad=0)
    with pytest.raises(InitFailed, match=r"^model\.layers\.0\.mlp\.up_proj: .* 0 directions"):
        initialize(
            context.model, context.targets, context.lora, seed=0, probe=probe, evidence=evidence,
            on_event=lambda event: None,
        )  # fmt: skip


# --- a whole run -------------------------------------------------------------------------------


@pytest.mark.usefixtures("training_only")
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_run_starts_as_the_base_with_a_fresh_optimizer_on_the_first_batch(spec, tmp_path, monkeypatch, base):
    made = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: made.append(o := adamw(*a, **k)) or o)
    events = []
    done = run(spec(base, lora={"init": {"method": "hrp", "preheat_rank": 8}}), tmp_path, events.append)
    assert len(made) == 3  # of the preheat, of the update that is tried before step 1, and of the run
    report = json.loads((tmp_path / "adapter/init_report.json").read_text())
    assert report["max_abs_logit_difference"] == 0.0
    said = report["preheat"]
    assert (said["max_rank"], said["steps"], said["mode"]) == (8, 4, "classic")
    assert (said["main_optimizer"], said["main_data"]) == ("fresh", "from the start")
    assert all(m["product_norm"] == 0 and m["preheat_rank"] == 8 for m in report["per_module"])
    assert all(len(m["preheat_spectrum"]) == 4 and 0 < m["preheat_energy"] <= 1 for m in report["per_module"])
    assert done.export_check["passed"]
    # The preheat's first loss and the run's are of the same rows: the data is rewound.
    first = next(e.data["loss"] for e in events if isinstance(e, Message) and e.data.get("step") == 1)
    assert next(e.train_loss for e in events if e.kind == "metrics") == pytest.approx(first, rel=1e-6)


@pytest.mark.usefixtures("training_only")
def test_run_that_continues_begins_with_the_batch_after_the_preheat(spec, tmp_path):
    """Twelve rows, batches of five: after one preheat step comes the second batch, resumed or not."""
    init = {"method": "hrp", "preheat_rank": 8, "preheat_steps": 1}
    training = {"max_steps": 4, "checkpoint_interval": 2}

    def tokens(folder, **more):
        found = []
        made = spec(lora={"init": init | more.pop("init", {})}, training=training, **more)
        run(made, folder, lambda e: found.append(e.tokens) if e.kind == "metrics" else None)
        return [b - a for a, b in pairwise([0, *found])]

    rewound = tokens(tmp_path / "rewind")
    onward = tokens(tmp_path / "onward", init={"main_data": "continue"})
    assert onward[:3] == rewound[1:]
    point = str(tmp_path / "onward/checkpoints/step-000002")
    tokens(tmp_path / "again", init={"main_data": "continue"}, resume_from=point)
    files = [(tmp_path / n / "adapter/adapter_model.safetensors").read_bytes() for n in ("onward", "again")]
    assert files[0] == files[1]
    assert json.loads((tmp_path / "onward/adapter/init_report.json").read_text())["preheat"]["main_data"].startswith(
        "after"
    )


@pytest.mark.usefixtures("training_only")
def test_run_that_carries_starts_ahead_and_says_so(spec, tmp_path):
    init = {"method": "hrp", "preheat_rank": 8, "preheat_steps": 8, "preheat_learning_rate": 0.01, "b_init": "carry"}
    done = run(spec(lora={"init": init}, training={"max_steps": 1}), tmp_path, lambda event: None)
    report = json.loads((tmp_path / "adapter/init_report.json").read_text())
    assert report["function_preserving"] is False
    assert report["calibration_loss"]["after"] < report["calibration_loss"]["before"]
    assert (done.export_check["passed"], done.export_check["export_rank"]) == (True, 4)


def test_rate_of_the_preheat_is_its_own(bases, rows):
    """Adam's first step has the size of the rate in every entry of B'."""
    for rate in (1e-3, 4e-3):
        for e in heat(hrp_context(bases, rows, preheat_steps=1, preheat_learning_rate=rate)).values():
            assert float(e.preheated[1].abs().median()) == pytest.approx(rate, rel=1e-3)
