"""What both activation collectors promise: padding is never seen, nothing is left behind, layers share."""

import math

import pytest
import torch
from torch import nn

from lorainit.config.errors import InitFailed, UnsupportedInit
from lorainit.config.events import Message, Tick
from lorainit.data.dataset import Sample
from lorainit.init.collectors import moments
from lorainit.init.collectors.collect import collect
from lorainit.init.collectors.inputs import find_shared_inputs
from tests.lorainit.contexts import make_context, state

METHODS = ["eva", "corda"]


def gather(bases, rows, method, base="llama", **options):
    context = make_context(bases[base], rows, method, **options)
    return collect(context.lora.method, context)


def difference(method, one, two):
    """Largest relative difference of two layers' evidence, whatever the signs of directions."""
    if method == "corda":
        return float((one.second_moment - two.second_moment).norm() / one.second_moment.norm())
    P, Q = (e.directions.T @ e.directions for e in (one, two))
    return float((P - Q).norm()) if one.rank == two.rank else math.inf


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_model_and_generator_are_as_they_were(bases, rows, method, base):
    context = make_context(bases[base], rows, method)
    before, chance = state(context.model), torch.get_rng_state()
    one = collect(context.lora.method, context)
    assert state(context.model) == before
    assert torch.equal(torch.get_rng_state(), chance)
    two = collect(context.lora.method, context)
    for name, evidence in one.items():
        for field in ("directions", "spread", "second_moment"):
            a, b = getattr(evidence, field), getattr(two[name], field)
            assert (a is None) == (b is None)
            assert a is None or (torch.equal(a, b) and not a.requires_grad)
        assert evidence.rank == two[name].rank
        assert evidence.rows == 12


@pytest.mark.parametrize("method", METHODS)
def test_hooks_are_gone_after_a_stop(bases, rows, method):
    def stop(event):
        if isinstance(event, Tick) and event.done == 2:
            raise KeyboardInterrupt

    context = make_context(bases["llama"], rows, method, on_event=stop)
    before = state(context.model)
    with pytest.raises(KeyboardInterrupt):
        collect(context.lora.method, context)
    assert state(context.model) == before


@pytest.mark.parametrize("method", METHODS)
def test_the_padding_token_changes_nothing(bases, rows, method):
    one = gather(bases, rows, method, pad=0)
    two = gather(bases, rows, method, pad=77)
    assert max(difference(method, one[n], two[n]) for n in one) == 0.0


def test_second_moments_do_not_depend_on_batches(bases, rows):
    alone, together = (gather(bases, rows, "corda", size=size) for size in (1, 12))
    assert max(difference("corda", alone[n], together[n]) for n in alone) < 1e-5


def test_variance_explained_hardly_depends_on_batches(bases, rows):
    """Incremental components lose what lies beyond those they carry, and a flat spectrum has no own directions."""
    small, large = (gather(bases, rows, "eva", size=size) for size in (4, 12))
    for name, evidence in small.items():
        assert abs(evidence.rank - large[name].rank) <= 1
        per_rank = [e.facts["explained_variance"] / e.rank for e in (evidence, large[name])]
        assert per_rank[0] == pytest.approx(per_rank[1], rel=0.2)


def test_layers_with_one_input_share_the_computation(bases, rows):
    context = make_context(bases["llama"], rows, "corda")
    leader = find_shared_inputs(context, context.samples[:2])
    q, up = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"
    for one, two in (("self_attn.q_proj", q), ("self_attn.k_proj", q), ("self_attn.v_proj", q), ("mlp.up_proj", up)):
        assert leader[f"model.layers.0.{one}"] == two
    assert len(set(leader.values())) == 8
    evidence = collect(context.lora.method, context)
    assert evidence[q].second_moment is evidence["model.layers.0.self_attn.v_proj"].second_moment


def test_only_the_first_rows_are_looked_at(bases, rows):
    two = gather(bases, rows, {"method": "corda", "samples": 2})
    assert {e.rows for e in two.values()} == {2}
    all_of_them = gather(bases, rows, "corda")
    assert difference("corda", two["model.layers.0.mlp.up_proj"], all_of_them["model.layers.0.mlp.up_proj"]) > 0.01


def test_blocks_on_a_small_device_give_the_same_moments(bases, rows, monkeypatch):
    whole = gather(bases, rows, "corda")
    blocks = moments._blocks
    monkeypatch.setattr(moments, "_blocks", lambda sides, limit: blocks(sides, 2 * 4 * 32 * 32))
    parts = gather(bases, rows, "corda")
    assert max(difference("corda", whole[n], parts[n]) for n in whole) == 0.0
    assert blocks({"a": 10, "b": 10, "c": 30}, 801) == [["a", "b"], ["c"]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("samples", "said"), [(12, 0), (13, 1)])
def test_fewer_rows_than_asked_for_are_said_aloud(bases, rows, method, samples, said):
    events = []
    gather(bases, rows, {"method": method, "samples": samples}, on_event=events.append)
    found = [e.data for e in events if isinstance(e, Message) and e.level == "warn"]
    assert found == said * [{"kind": "init", "samples": 12, "asked": 13}]


@pytest.mark.parametrize("method", METHODS)
def test_no_rows_are_refused(bases, rows, method):
    context = make_context(bases["llama"], rows, method)
    context.data.samples.clear()
    with pytest.raises(UnsupportedInit, match="there are none"):
        collect(context.lora.method, context)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_are_not_finite_are_refused_by_name(bases, rows, method):
    context = make_context(bases["llama"], rows, method)
    context.model.get_submodule("model.layers.1.post_attention_layernorm").weight.data[0] = math.nan
    with pytest.raises(InitFailed, match=r"model\.layers\.1\.mlp\.gate_proj: its inputs are not finite"):
        collect(context.lora.method, context)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_the_rows_never_reach_is_refused_by_name(bases, rows, method):
    context = make_context(bases["llama"], rows, method)
    context.targets["model.spare"] = nn.Linear(32, 32)
    with pytest.raises(UnsupportedInit, match=r"never reach model\.spare"):
        collect(context.lora.method, context)


class Flat(nn.Module):
    """Hands its layer all tokens of all rows, or all but `left_out`, without saying where a row ends."""

    def __init__(self, linear, left_out=0):
        super().__init__()
        self.linear, self.left_out = linear, left_out

    def forward(self, x):
        flat = x.flatten(0, 1)
        y = self.linear(flat[: len(flat) - self.left_out])
        return torch.nn.functional.pad(y, (0, 0, 0, self.left_out)).view(*x.shape[:2], -1)


def with_flat_layer(bases, rows, method, left_out=0):
    context = make_context(bases["llama"], rows, method)
    linear = context.targets["model.layers.0.mlp.down_proj"]
    context.model.get_submodule("model.layers.0.mlp").down_proj = Flat(linear, left_out)
    return collect(context.lora.method, context)


@pytest.mark.parametrize("method", METHODS)
def test_rows_end_to_end_are_told_apart(bases, rows, method):
    """As OPT hands them to fc1 and fc2."""
    one, two = gather(bases, rows, method), with_flat_layer(bases, rows, method)
    assert max(difference(method, one[n], two[n]) for n in one) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_are_not_one_for_each_token_are_refused_by_name(bases, rows, method):
    with pytest.raises(UnsupportedInit, match=r"^model\.layers\.0\.mlp\.down_proj: its inputs come as"):
        with_flat_layer(bases, rows, method, left_out=3)


def test_second_moment_is_the_mean_over_rows_of_scaled_inputs(bases, rows):
    context = make_context(bases["llama"], rows, {"method": "corda", "samples": 3}, size=3)
    name = "model.layers.1.mlp.down_proj"
    wanted, inputs = torch.zeros(48, 48), []
    handle = context.targets[name].register_forward_pre_hook(lambda _module, args: inputs.append(args[0][0]))
    for sample in context.samples[:3]:
        assert isinstance(sample, Sample)
        with torch.no_grad():
            context.model(input_ids=sample.ids[None].long())
        X = inputs.pop()
        X = X / X.abs().max()
        wanted += X.T @ X / 3
    handle.remove()
    found = collect(context.lora.method, context)[name].second_moment
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
