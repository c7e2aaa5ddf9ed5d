"""Which layers carry a LoRA: the right value for each architecture, the same in the API as in the engine."""

import json
import re
import warnings
from functools import cache

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from api.core.errors import InvalidValue
from api.core.models import catalogue
from lorainit.config.errors import LorainitError, RankTooLarge, UnknownTarget, UnsupportedInit
from lorainit.config.events import Message, Plan
from lorainit.config.paths import expand_names, matches
from lorainit.config.spec import Lora, RunSpec
from lorainit.export.peft_adapter import export
from lorainit.model.forward import attention
from lorainit.model.inspect import inspect
from lorainit.model.layers import experts
from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import LoRALinear, attach
from lorainit.model.layers.weight import shape_of
from lorainit.model.layout import choose_layout
from lorainit.model.load import build_skeleton, load_model
from lorainit.model.targets import peft_support
from lorainit.model.targets import targets as targets_module
from lorainit.model.targets.names import pattern_of
from lorainit.model.targets.targets import describe, find_targets, resolve, survey
from lorainit.run import run
from tests.lorainit.conftest import tiny_llama
from tests.zoo.bases import make

EXPERTS = "experts.gate_up_proj experts.down_proj"
LATENT = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj"
QKVO, GATED = "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"
BESIDE = f"gate_proj up_proj mlp.down_proj shared_experts.down_proj {EXPERTS}"
# attention, mlp, other, and what gets none.
RIGHT = {
    "gpt2": ("c_attn attn.c_proj", "c_fc mlp.c_proj", "", ""),
    "opt-narrow": ("q_proj k_proj v_proj out_proj", "fc1 fc2", "project_in project_out", ""),
    "bloom": ("query_key_value dense", "dense_h_to_4h dense_4h_to_h", "", ""),
    "mpt": ("Wqkv out_proj", "up_proj down_proj", "", ""),
    "lfm2": ("q_proj k_proj v_proj self_attn.out_proj", "w1 w2 w3", "in_proj conv.out_proj", ""),
    "mamba": ("", "", "in_proj", "x_proj dt_proj out_proj"),
    "jamba": (QKVO, f"gate_proj up_proj feed_forward.down_proj {EXPERTS}", "in_proj x_proj out_proj", "dt_proj"),
    "nemotron_h": (QKVO, "mixer.up_proj mixer.down_proj shared_experts.up_proj shared_experts.down_proj"
                   " experts.up_proj experts.down_proj", "in_proj", "out_proj"),
    "zamba2": (QKVO, "gate_up_proj down_proj", "in_proj linear", "out_proj gate_up_proj_adapter_list.*.*"
               " linear_q_adapter_list.*.* linear_k_adapter_list.*.* linear_v_adapter_list.*.*"),
    "phimoe": (QKVO, EXPERTS, "", "router"),
    "qwen3_next": (f"in_proj_qkvz in_proj_ba out_proj {QKVO}", f"gate_proj up_proj shared_expert.down_proj {EXPERTS}",
                   "", "shared_expert_gate"),
    "deepseek_v3": (LATENT, BESIDE, "", ""),
    "gemma3n": (QKVO, GATED, "linear_left linear_right per_layer_input_gate per_layer_projection"
                " per_layer_model_projection", "correction_coefs prediction_coefs modality_router"
                " altup_projections.* altup_unembed_projections.*"),
    "gemma3-vision": (f"{' '.join(f'language_model.layers.*.self_attn.{x}_proj' for x in 'qkv')} o_proj", GATED, "",
                      f"{' '.join(f'encoder.layers.*.self_attn.{x}_proj' for x in 'qkv')} out_proj fc1 fc2"),
    "bert-decoder": ("query key value attention.output.dense", "intermediate.dense layer.*.output.dense",
                     "transform.dense", ""),
}  # fmt: skip
MORE = {
    "llama": (QKVO, GATED, "", ""),
    "phi": ("q_proj k_proj v_proj dense", "fc1 fc2", "", ""),
    "phi3": ("qkv_proj o_proj", "gate_up_proj down_proj", "", ""),
    "gpt_neo": ("q_proj k_proj v_proj out_proj", "c_fc c_proj", "", ""),
    "gpt_neox": ("query_key_value dense", "dense_h_to_4h dense_4h_to_h", "", ""),
    "gptj": ("q_proj k_proj v_proj out_proj", "fc_in fc_out", "", ""),
    "falcon": ("query_key_value dense", "dense_h_to_4h dense_4h_to_h", "", ""),
    "xglm": ("q_proj k_proj v_proj out_proj", "fc1 fc2", "", ""),
    "mixtral": (QKVO, EXPERTS, "", ""),
    "qwen2_moe": (QKVO, f"gate_proj up_proj shared_expert.down_proj {EXPERTS}", "", "shared_expert_gate"),
    "glm4_moe": (QKVO, BESIDE, "", ""),
    "hunyuan_v1_moe": (QKVO, f"gate_proj up_proj shared_mlp.down_proj {EXPERTS}", "", "wg"),
    "llama4": (QKVO, f"gate_proj up_proj feed_forward.down_proj shared_expert.down_proj {EXPERTS}", "", "router"),
    "falcon_mamba": ("", "", "in_proj", "x_proj dt_proj out_proj"),
    "mamba2": ("", "", "in_proj", "out_proj"),
    "bamba": (QKVO, GATED, "in_proj", "out_proj"),
    "falcon_h1": (QKVO, GATED, "in_proj", "out_proj"),
    "granitemoehybrid": (QKVO, f"input_linear output_linear {EXPERTS}", "in_proj", "out_proj"),
    "recurrent_gemma": (QKVO, GATED, "linear_x linear_y linear_out", ""),
    "rwkv": ("attention.key attention.value attention.receptance", "feed_forward.key feed_forward.receptance", "",
             "output feed_forward.value"),
}  # fmt: skip
KINDS = [*RIGHT, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)]


@pytest.fixture(scope="module")
def skeletons(tmp_path_factory):
    """A kind's modules without weights, as `inspect` sees them."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = build_skeleton(make(kind, tmp_path_factory.mktemp("bases") / kind))
            experts.install(made[kind])
        return made[kind]

    return of


@pytest.fixture(scope="module")
def surveyed_once():
    """Each model is surveyed once, and not for each of hundreds of names that are resolved in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets_module, "survey", cache(survey))
        yield


def entry_of(targets, left_out=()):
    """A catalogue entry with these facts."""
    facts = {"targets": targets, "left_out": list(left_out)}
    named = {"id": "x", "source": "/x", "root": "local:x", "max_length": 64, "chat": True}
    return catalogue.Entry.model_validate(named | facts)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_each_group_and_those_that_get_none(skeletons, kind):
    targets, left_out = describe(skeletons(kind))
    found = [{t.name for t in targets if t.group == group} for group in ("attention", "mlp", "other")]
    assert [*found, {layer.name for layer in left_out}] == [set(names.split()) for names in (RIGHT | MORE)[kind]]
    assert all(layer.reason for layer in left_out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_and_the_engine_adapt_the_same_layers(skeletons, kind, surveyed_once):
    model = skeletons(kind)
    targets, left_out = describe(model)
    entry = entry_of(targets, left_out)
    for group in ("all-linear", *{t.group for t in targets} - {"other"}):
        lora = Lora(r=16, target_modules=group)
        resolved = catalogue.resolve_targets(lora, entry)
        layers, missed = resolve(model, lora)
        assert resolve(model, resolved) == (layers, missed)
        assert resolved.left_out == missed
        assert catalogue.count_parameters(resolved, entry) == (
            len(layers),
            sum(16 * sum(shape_of(m)) for m in layers.values()),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_every_end_of_a_full_name_means_the_same_over_rest_as_in_the_engine(skeletons, kind, surveyed_once):
    model = skeletons(kind)
    targets, left_out = describe(model)
    entry = entry_of(targets, left_out)
    full = {path for layer in (*targets, *left_out) for one in layer.paths for path in expand_names(one)}
    assert full >= {layer.path for layer in survey(model).values()}
    ends = {".".join(path.split(".")[start:]) for path in full for start in range(path.count(".") + 1)}
    for end in sorted(ends | {pattern_of(end) for end in ends}):
        lora = Lora(r=1, target_modules=[end])
        try:
            layers, missed = resolve(model, lora)
        except UnknownTarget as refused:
            with pytest.raises(InvalidValue, match=re.escape(refused.message.rpartition("Left out: ")[2][-60:-1])):
                catalogue.resolve_targets(lora, entry)
            continue
        resolved = catalogue.resolve_targets(lora, entry)
        assert list(resolve(model, resolved)[0]) == list(layers)
        assert catalogue.count_parameters(resolved, entry)[0] == len(layers)
        assert [(x.name, x.count, x.paths) for x in resolved.left_out] == [(x.name, x.count, x.paths) for x in missed]
        assert all(matches(path, end) for x in missed for one in x.paths for path in expand_names(one))


def test_names_that_share_layers_are_counted_once(skeletons):
    model = skeletons("llama")
    entry = entry_of(describe(model)[0])
    for wanted, layers in (
        (["layers.0.self_attn.q_proj", "0.self_attn.q_proj"], 1),
        (["q_proj", "0.self_attn.q_proj"], 2),
    ):
        resolved = catalogue.resolve_targets(Lora(r=1, target_modules=wanted), entry)
        assert catalogue.count_parameters(resolved, entry)[0] == len(resolve(model, resolved)[0]) == layers


def test_a_name_that_nothing_ends_in_is_refused_with_what_there_is(skeletons):
    targets, _ = describe(skeletons("llama"))
    entry = entry_of(targets)
    for name in ("self_attn.up_proj", "layers.2.self_attn.q_proj", "²", "_proj"):
        with pytest.raises(InvalidValue, match=r"has a name that ends like this\. Available: q_proj"):
            catalogue.resolve_targets(Lora(r=1, target_modules=[name]), entry)


def test_what_an_adapter_would_be_renamed_to_on_reading_is_left_out(skeletons):
    """transformers takes `shared_experts` of a Laguna for the older `shared_expert`, in adapters too."""
    targets, left_out = describe(skeletons("laguna"))
    assert {x.name for x in left_out} == {f"shared_experts.{x}_proj" for x in ("gate", "up", "down")}
    assert {x.reason for x in left_out} == {peft_support.RENAMED}
    assert "mlp.down_proj" in {x.name for x in targets}  # of the dense layer


@pytest.mark.parametrize(
    ("kind", "name", "why"),
    [
        ("phimoe", "router", "router or gate"),
        ("qwen3_next", "shared_expert_gate", "router or gate"),
        ("mamba", "x_proj", "read directly"),
        ("jamba", "dt_proj", "read directly"),
        ("gemma3n", "correction_coefs", "read directly"),
        ("zamba2", "linear_q_adapter_list.*.*", "no name of its own"),
        ("gemma3-vision", "fc1", "vision or audio tower"),
    ],
)
def test_a_layer_that_cannot_carry_one_is_refused_by_name_with_the_reason(skeletons, kind, name, why):
    with pytest.raises(UnknownTarget, match=why) as caught:
        resolve(skeletons(kind), Lora(r=1, target_modules=["in_proj" if kind == "mamba" else "o_proj", name]))
    assert caught.value.param == "lora.target_modules[1]"


@pytest.mark.parametrize("name", ["gate", "shared_expert_gate"])
def test_a_router_that_is_named_is_a_wrong_target_whether_it_is_linear_or_not(skeletons, name):
    with pytest.raises(UnknownTarget, match=rf"{name}.*router or gate: which experts run") as caught:
        resolve(skeletons("qwen2_moe"), Lora(r=1, target_modules=["q_proj", name]))
    assert (caught.value.code, caught.value.param) == ("invalid_value", "lora.target_modules[1]")


def test_layers_smaller_than_the_rank_are_left_out_of_a_group_and_refused_by_name(skeletons):
    model = skeletons("qwen3_next")
    layers, left_out = resolve(model, Lora(r=32))
    assert not any(name.endswith("in_proj_ba") for name in layers)  # 16×64
    assert {x.name: x.reason for x in left_out}["in_proj_ba"] == "a matrix of that name is smaller than the rank, 32"
    with pytest.raises(RankTooLarge, match="in_proj_ba"):
        resolve(model, Lora(r=32, target_modules=["in_proj_ba"]))


def test_a_name_of_text_and_tower_means_the_text(skeletons):
    layers, left_out = resolve(skeletons("gemma3-vision"), Lora(target_modules=["q_proj"]))
    assert len(layers) == 2 and all(".language_model." in name for name in layers)
    assert [(x.name, x.count) for x in left_out] == [("encoder.layers.*.self_attn.q_proj", 1)]


def test_dora_is_left_out_where_peft_adapts_parameters(skeletons):
    layers, left_out = resolve(skeletons("deepseek_v3"), Lora(use_dora=True))
    assert {name.rpartition(".")[2] for name in layers} == set(LATENT.split())
    assert {x.name for x in left_out} == set(BESIDE.split())
    with pytest.raises(UnsupportedInit, match="has no DoRA") as caught:
        resolve(skeletons("deepseek_v3"), Lora(use_dora=True, target_modules="mlp"))
    assert caught.value.param == "lora.use_dora"


def test_a_layer_in_two_modules_is_left_out_since_peft_adapts_the_first_only():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    layers, left_out = resolve(model, Lora(r=4))
    assert not any(name.endswith("up_proj") for name in layers)
    assert [(x.name, x.count) for x in left_out] == [("up_proj", 1)]
    assert "registered at 2 places" in left_out[0].reason


def test_what_peft_refuses_is_left_out_with_its_words_and_nothing_else_is(skeletons, monkeypatch):
    monkeypatch.setattr(peft_support, "_observe", lambda *_: {})
    peft_support._refusals.cache_clear()
    mamba = [f"backbone.layers.{i}.mixer.{part}_proj" for i in (0, 1) for part in ("in", "out")]
    found = peft_support.find_refusals(skeletons("mamba2"), mamba)
    peft_support._refusals.cache_clear()
    assert set(found) == {name for name in mamba if "out_proj" in name}
    assert all("Module 'out_proj' is incompatible with Mamba-based models" in why for why in found.values())


def test_an_adapter_that_is_not_heard_is_left_out(skeletons, monkeypatch):
    """Jamba multiplies with the weight of `dt_proj` itself: PEFT adapts the layer, and nothing of it is used."""
    monkeypatch.setattr(peft_support, "_observe", lambda *_: {})
    peft_support._refusals.cache_clear()
    name = next(n for n, _ in skeletons("jamba").named_modules() if n.endswith("dt_proj"))
    assert peft_support.find_refusals(skeletons("jamba"), [name]) == {name: peft_support.UNHEARD}
    peft_support._refusals.cache_clear()


# --- the download ------------------------------------------------------------------------------------


def adapted(model, wanted):
    generator, layers = torch.Generator().manual_seed(5), {}
    for name, module in find_targets(model, wanted).items():
        out, n = shape_of(module)
        A, B = (torch.randn(*shape, generator=generator) * 0.1 for shape in ((3, n), (out, 3)))
        layers[name] = LoRALinear(module, Factors(A, B), scale=0.5, subtract=False)
        attach(model, name, layers[name])
    return layers


READ = ("deepseek_v3", "qwen3_next", "gpt2", "lfm2")
READ_SLOWLY = (
    "deepseek_v2", "glm4_moe", "glm4_moe_lite", "dots1", "ernie4_5_moe", "hunyuan_v1_moe", "qwen2_moe", "llama4",
    "jamba", "nemotron_h", "zamba2", "gemma3n", "gemma3-vision", "opt-narrow", "bert-decoder", "rwkv", "mamba",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        *((kind, "all-linear") for kind in READ),
        ("deepseek_v3", ["up_proj"]),
        *(pytest.param(kind, ["up_proj"], marks=pytest.mark.slow) for kind in READ[1:]),
        *(
            pytest.param(kind, wanted, marks=pytest.mark.slow)
            for kind in READ_SLOWLY
            for wanted in ("all-linear", ["up_proj"])
        ),
    ],
)
def test_stock_peft_reads_every_tensor_and_says_the_same(kind, wanted, tmp_path):
    """PEFT would take `gate_proj` beside experts for the experts of an older file, and read nothing."""
    folder = make(kind, tmp_path / "base")
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    experts.install(model)
    try:
        layers = adapted(model, wanted)
    except LorainitError:
        assert wanted == ["up_proj"] and "up_proj" not in re.findall(r"\w+", str((RIGHT | MORE).get(kind, "")))
        return
    export(model, layers, tmp_path / "adapter", root="tests/base")
    ids = torch.randint(5, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        untouched = base(input_ids=ids, use_cache=False).logits
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids, use_cache=False).logits
        ours = model(input_ids=ids, use_cache=False).logits
    assert float((ours - untouched).abs().max()) > 1e-3
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-4)


# --- what is told ------------------------------------------------------------------------------------


def test_a_run_says_what_it_leaves_out_and_the_plan_has_it(rows, tmp_path):
    folder = make("qwen2_moe", tmp_path / "base")
    spec = RunSpec.model_validate(
        {
            "model": {"id": "moe", "source": str(folder), "root": "tests/moe", "max_length": 256},
            "data": {"training": str(rows)},
            "training": {"max_steps": 1, "batch_size": 2, "learning_rate": 1e-3, "precision": "fp32"},
        }
    )
    events = []
    run(spec, tmp_path / "out", events.append)  # with the default rank, 16
    (plan,) = (event for event in events if isinstance(event, Plan))
    assert [(x.name, x.count) for x in plan.left_out] == [("shared_expert_gate", 2)]
    told = [e for e in events if isinstance(e, Message) and e.data.get("kind") == "targets"]
    assert "shared_expert_gate (2): it is a router or gate" in told[0].message
    manifest = json.loads((tmp_path / "out" / "adapter" / "manifest.json").read_text())
    assert manifest["lora"]["left_out"][0]["name"] == "shared_expert_gate"


def test_an_entry_of_an_older_version_is_read_and_refused_where_its_names_mean_two_groups():
    old = [("c_attn", "attention", 96), ("c_proj", "attention", 32), ("c_proj", "mlp", 32)]
    targets = [{"name": n, "group": g, "out_features": out, "in_features": 32, "count": 2} for n, g, out in old]
    entry = entry_of(targets)
    assert catalogue.resolve_targets(Lora(r=4), entry).target_modules == ["c_attn", "c_proj"]
    with pytest.raises(InvalidValue, match="written by an older version") as caught:
        catalogue.resolve_targets(Lora(r=4, target_modules="attention"), entry)
    assert caught.value.param == "lora.target_modules"


def test_a_base_without_any_layer_for_a_lora_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lorainit.model.inspect.describe", lambda model: ([], []))
    with pytest.raises(LorainitError, match="No layer of the base model can carry a LoRA"):
        inspect(str(make("llama", tmp_path / "base")), cache=tmp_path)


def test_layers_without_a_transformers_model_around_them_are_not_tried():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj = nn.Linear(4, 4)

        def get_output_embeddings(self):
            return None

    assert list(find_targets(Bare(), "all-linear")) == ["up_proj"]


def test_finding_targets_leaves_nothing_behind_in_our_attention(bases):
    """Masks are kept for later passes: one that was made while shapes were tried has no numbers in it."""
    model = load_model(bases["llama"], dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.arange(3, 3 + peft_support.TOKENS)[None]
    truth = model(input_ids=ids, use_cache=False).logits
    assert choose_layout(model).rows == "packed"
    attention._mask.cache_clear()
    peft_support._refusals.cache_clear()
    find_targets(model, "all-linear")
    assert torch.allclose(model(input_ids=ids, use_cache=False).logits, truth, atol=1e-5)


def test_a_mask_without_numbers_is_not_kept():
    attention._mask.cache_clear()
    with FakeTensorMode(), pytest.raises(AssertionError):
        attention._mask(8, 0, None, torch.float32)
    assert attention._mask(8, 0, None, torch.float32)[0].tolist() == [0.0, *[-torch.inf] * 7]
