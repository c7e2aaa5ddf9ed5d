"""Experts of mixtures: untouched they are stock transformers', adapted they are stock PEFT's `target_parameters`."""

import json
import shutil
import warnings

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DbrxConfig, JetMoeConfig, LongcatFlashConfig

from lorainit.config.errors import GroupMismatch, UnsupportedInit
from lorainit.config.events import InitReport, Message, Plan
from lorainit.config.spec import Lora, RunSpec
from lorainit.context import RunRequest
from lorainit.data.batches import collate
from lorainit.export.peft_adapter import export
from lorainit.init.collectors.collect import collect
from lorainit.init.methods import METHODS
from lorainit.model.forward.loss import row_losses
from lorainit.model.inspect import inspect
from lorainit.model.layers import experts
from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import LoRALinear, attach
from lorainit.model.load import load_model
from lorainit.model.targets import moe
from lorainit.model.targets.targets import find_targets
from lorainit.run import run, run_together
from tests.lorainit.contexts import make_context
from tests.zoo.bases import KINDS, make

pytestmark = pytest.mark.usefixtures("training_only")

KIND = [name for name, kind in KINDS.items() if kind.family == "mixture" and not kind.missing]
NAMED = {"mixtral", "qwen3_next", "gpt_oss", "deepseek_v3", "llama4"}
PLAIN = {"gaussian", "orthogonal", "milora", "olora", "kaiming", "loram"}  # as pissa, to what stands around them
CPU, SCALE = torch.device("cpu"), 0.5
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
TRAINING = {"max_steps": 3, "batch_size": 5, "learning_rate": 1e-3, "precision": "fp32"}


def slowly(names, quick):
    return [name if quick(name) else pytest.param(name, marks=pytest.mark.slow) for name in sorted(names)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Makes the base of a kind, once."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = make(kind, tmp_path_factory.mktemp("bases") / kind)
        return made[kind]

    return folder


def stock(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def tokens():
    return torch.randint(3, 300, (3, 30), generator=torch.Generator().manual_seed(4))


def installed(folder):
    model = load_model(folder, dtype=torch.float32, device=CPU)
    assert experts.install(model)
    return model


def adapted(model, wanted, rank=lambda name, number: 3):
    """Random factors, B among them, on the wanted layers; by name."""
    generator, layers = torch.Generator().manual_seed(5), {}
    for number, (name, module) in enumerate(find_targets(model, wanted).items()):
        r = rank(name, number)
        A = torch.randn(r, module.in_features, generator=generator) * module.in_features**-0.5
        B = torch.randn(module.out_features, r, generator=generator) * 0.3
        layers[name] = LoRALinear(module, Factors(A, B), scale=SCALE, subtract=False)
        attach(model, name, layers[name])
    return layers


def read_back(folder, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(stock(folder), adapter, is_trainable=True).eval()


def loss_of(model):
    logits = model(input_ids=tokens()).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())


@pytest.mark.parametrize("kind", slowly(KIND, quick=lambda kind: kind in NAMED))
def test_untouched_experts_compute_what_stock_ones_do(folders, kind):
    with torch.no_grad():
        wanted = stock(folders(kind))(input_ids=tokens()).logits
        found = installed(folders(kind))(input_ids=tokens()).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", slowly(KIND, quick=lambda kind: kind in NAMED))
def test_values_and_gradients_of_adapted_experts_are_those_of_stock_peft(folders, kind, tmp_path):
    model = installed(folders(kind))
    layers = adapted(model, PARAMETERS)
    export(model, layers, tmp_path, root="tests/mixture")
    theirs = read_back(folders(kind), tmp_path)
    ours, reference = loss_of(model), loss_of(theirs)
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
    ours.backward()
    reference.backward()
    compared = 0
    for name, wrapper in theirs.named_modules():
        if isinstance(wrapper, ParamWrapper):
            parameter = f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{wrapper.parameter_name}"
            for number, (dA, dB) in enumerate(gradients(wrapper)):
                layer = layers[f"{parameter}.{number}"]
                zero = torch.zeros_like
                torch.testing.assert_close(
                    layer.A.grad if layer.A.grad is not None else zero(dA), dA, atol=1e-5, rtol=1e-4
                )
                torch.testing.assert_close(
                    layer.B.grad if layer.B.grad is not None else zero(dB), dB, atol=1e-5, rtol=1e-4
                )
                compared += 1
    assert compared == len(layers)


@pytest.mark.parametrize(
    ("wanted", "ranks"),
    [
        (["experts.gate_up_proj"], "pattern"),
        (["experts.down_proj"], "padded"),
        (PARAMETERS, "padded"),
        *(
            pytest.param(wanted, ranks, marks=pytest.mark.slow)
            for wanted, ranks in (
                (["experts.gate_up_proj"], "padded"), (["experts.down_proj"], "pattern"), (PARAMETERS, "pattern"),
            )
        ),
    ],
)  # fmt: skip
def test_experts_of_several_ranks_and_one_projection_alone_are_read_as_they_are(folders, wanted, ranks, tmp_path):
    model = installed(folders("mixtral"))
    layers = adapted(model, wanted, rank=lambda name, number: number % 4 if "layers.1" in name else min(number, 2))
    export(model, layers, tmp_path, root="tests/mixture", ranks=ranks)
    with torch.no_grad():
        found = read_back(folders("mixtral"), tmp_path)(input_ids=tokens()).logits
        torch.testing.assert_close(found, model(input_ids=tokens()).logits, atol=1e-5, rtol=1e-5)


def gradients(wrapper):
    """Of the A (r×in) and B (out×r) of every expert, by PEFT's own rule for the order of the ranks."""
    A, B = wrapper.lora_A["default"].weight.grad, wrapper.lora_B["default"].weight.grad
    n = wrapper.num_experts
    pairs = zip(A.reshape(n, -1, A.shape[1]), B.reshape(len(B), -1, n).permute(2, 0, 1), strict=True)
    for dA, dB in pairs:
        # PEFT cannot know that Llama 4 stores in×out: to it the matrix is its transpose.
        yield (dB.T, dA.T) if type(wrapper.get_base_layer()).__name__ == "Llama4TextExperts" else (dA, dB)


def test_weight_of_an_expert_is_a_view_and_in_no_state_dict_twice(folders):
    model = installed(folders("gpt_oss"))
    stacks = experts.find_stacks(model)
    for stack in stacks.values():
        assert all(layer.weight.data_ptr() - stack.weight.data_ptr() < stack.weight.nbytes for layer in stack)
        assert (stack[1].out_features, stack[1].in_features) == tuple(stack[1].weight.shape)
    names = [name for name in model.state_dict() if ".experts." in name]
    assert len(names) == 2 * len(stacks)  # the weight and the bias of each
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in stock(folders("gpt_oss")).parameters())


def test_installing_twice_changes_nothing(folders):
    model = installed(folders("mixtral"))
    before = experts.find_stacks(model)
    assert experts.install(model) == before


def spec(folder, rows, **overrides):
    value = {
        "model": {"id": "mixture", "source": str(folder), "root": "tests/mixture", "max_length": 256},
        "data": {"training": str(rows)},
        "lora": {"init": "kaiming", "r": 4, "target_modules": "mlp"} | overrides.pop("lora", {}),
        "training": TRAINING,
    }
    return RunSpec.model_validate(value | overrides)


def test_download_of_a_mixture_is_read_by_stock_peft(folders, rows, tmp_path):
    """In a new process: tests/readers/test_mixtures.py."""
    done = run(spec(folders("mixtral"), rows), tmp_path / "out", lambda event: None)
    ids = tokens()[:1, :12]
    with torch.no_grad():
        theirs = read_back(folders("mixtral"), done.adapter)(input_ids=ids).logits
        base = stock(folders("mixtral"))(input_ids=ids).logits
        model = installed(folders("mixtral"))
        for name, module in find_targets(model, "mlp").items():
            attach(model, name, from_checkpoint(tmp_path / "out", name, module))
        trained = model(input_ids=ids).logits
    torch.testing.assert_close(theirs, trained, atol=1e-5, rtol=1e-5)
    assert (trained - base).abs().max() > 1e-3
    assert "`target_parameters`" in (tmp_path / "out/adapter/README.md").read_text()


def from_checkpoint(out, name, module):
    """A layer as training left it, from the state that is written beside the adapter."""
    (state,) = (out / "checkpoints").glob("step-000003/*.safetensors")
    found = load_file(state)
    return LoRALinear(module, Factors(found[f"layer.{name}.A"], found[f"layer.{name}.B"]), scale=1.0, subtract=False)


# --- evidence --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lonely(folders, tmp_path_factory):
    """GPT-OSS whose router never chooses the last expert of the first layer."""
    folder = tmp_path_factory.mktemp("lonely") / "base"
    shutil.copytree(folders("gpt_oss"), folder)
    model = load_model(folder, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[3] = -1e4
    model.save_pretrained(folder)
    return folder


def said(events):
    return [event.message for event in events if isinstance(event, Message)]


@pytest.mark.parametrize("method", slowly(METHODS.keys() - {"loftq"}, quick=lambda method: method not in PLAIN))
def test_every_initialization_runs_a_job_on_a_mixture_with_an_expert_that_no_token_reaches(
    lonely, rows, tmp_path, method
):
    events = []
    done = run(spec(lonely, rows, lora={"init": method}), tmp_path, events.append)
    assert done.export_check["passed"]
    modules = json.loads((tmp_path / "adapter" / "init_report.json").read_text())["per_module"]
    starved = {m["name"] for m in modules if m.get("start") == "kaiming"}
    unreached = {f"model.layers.0.mlp.experts.{name}.3" for name in ("gate_up_proj", "down_proj")}
    looks = method in ("lora_ga", "lora_one", "hrp", "eva", "corda")
    assert starved >= unreached if looks else not starved
    assert len(starved) < len(modules)
    assert any("start as kaiming does" in text for text in said(events)) == looks
    assert all(m["product_norm"] == 0 for m in modules if m["name"] in starved)


def test_padding_is_not_among_what_an_expert_is_fed(folders, rows):
    """One row at a time has no padding; five have: the second moments are the same."""
    found = [moments(folders("mixtral"), rows, size) for size in (1, 5)]
    for name, C in found[0].items():
        torch.testing.assert_close(found[1][name], C, atol=1e-5, rtol=1e-3)


def test_padding_is_not_among_what_latent_attention_shares_between_its_heads(folders, rows):
    found = [moments(folders("deepseek_v3"), rows, size, wanted=["kv_b_proj"]) for size in (1, 5)]
    assert len(found[0]) == 2
    for name, C in found[0].items():
        torch.testing.assert_close(found[1][name], C, atol=1e-5, rtol=1e-3)


def moments(folder, rows, size, wanted=("experts.down_proj",)):
    context = make_context(folder, rows, {"method": "corda"}, size=size, wanted=list(wanted), install=True)
    return {name: e.second_moment for name, e in collect(context.lora.method, context).items() if not e.starved}


def test_gradient_of_an_expert_is_that_of_its_part_of_the_parameter(folders, rows):
    context = make_context(
        folders("gpt_oss"), rows, {"method": "lora_ga"}, wanted=["experts.gate_up_proj"], install=True
    )
    found = collect(context.lora.method, context)
    model = context.model
    for stack in experts.find_stacks(model).values():
        stack.weight.requires_grad_()
    for row in context.samples:
        (row_losses(model, collate([row], pad=0)).sum() / len(context.samples)).backward()
    for name, module in context.targets.items():
        G = module.stack.weight.grad[module.number]
        G = G.T if module.stack.transposed else G
        torch.testing.assert_close(found[name].gradient, G, atol=1e-6, rtol=1e-4)


# --- what is left out, and what it costs -----------------------------------------------------------


def test_plan_and_events_count_every_expert(folders, rows, tmp_path):
    events = []
    run(spec(folders("qwen3_moe"), rows, lora={"target_modules": "all-linear"}), tmp_path, events.append)
    plan = next(event for event in events if isinstance(event, Plan))
    report = next(event for event in events if isinstance(event, InitReport)).report
    assert plan.modules == 2 * (4 + 2 * 4)
    assert plan.target_modules[-2:] == ["experts.gate_up_proj", "experts.down_proj"]
    assert plan.trainable_parameters == report["trainable_parameters"]
    (cost,) = [event for event in events if isinstance(event, Message) and "A mixture of experts" in event.message]
    assert cost.data["expert_matrices"] == 16
    assert cost.data["adapted_share"] > 0.99
    assert "99 % of the base's matrix weights" in cost.message


def test_dora_leaves_experts_out_with_words(folders, rows, tmp_path):
    events = []
    wanted = {"use_dora": True, "target_modules": "all-linear"}
    done = run(spec(folders("qwen3_moe"), rows, lora=wanted), tmp_path, events.append)
    assert done.export_check["passed"]
    (told,) = [text for text in said(events) if "no DoRA for experts" in text]
    assert told.startswith("Without a LoRA, ")


def test_dora_on_experts_that_are_named_is_refused(folders, rows, tmp_path):
    wanted = {"use_dora": True, "target_modules": ["q_proj", "experts.down_proj"]}
    with pytest.raises(UnsupportedInit, match="no DoRA for experts"):
        run(spec(folders("qwen3_moe"), rows, lora=wanted), tmp_path, lambda event: None)


OWN = {
    "longcat_flash": LongcatFlashConfig(
        vocab_size=64, hidden_size=32, ffn_hidden_size=64, expert_ffn_hidden_size=48, num_layers=1, n_routed_experts=4,
        zero_expert_num=2, moe_topk=2, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, head_dim=8,
    ),
    "jetmoe": JetMoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8, intermediate_size=48,
        num_local_experts=4,
    ),
    "dbrx": DbrxConfig(
        d_model=32, n_heads=4, n_layers=1, vocab_size=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", slowly(OWN, quick=lambda kind: kind != "longcat_flash"))
def test_experts_that_run_in_a_way_of_their_own_are_told_with_their_share(kind):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(OWN[kind])
    assert not experts.install(model)
    lora = Lora.model_validate({"init": "kaiming", "r": 4}).resolve()[0]
    told = moe.describe(model, find_targets(model, "all-linear"), lora)
    assert [message.level for message in told] == ["info", "warn"]
    assert "way of its own" in told[1].message
    layers = {n: p for n, p in model.named_parameters() if ".layers." in n or ".blocks." in n}
    whole = sum(p.numel() for n, p in layers.items() if p.ndim > 1 and not n.endswith("bias"))
    stacked = ("experts", "input_linear", "output_linear")
    sizes = {n: p.numel() for n, p in layers.items() if p.ndim > 1 and "router" not in n}
    held = sum(size for n, size in sizes.items() if any(word in n for word in stacked))
    assert f"{int(100 * held / whole)} %" in told[1].message


def test_a_dense_base_is_told_nothing_of_experts(bases):
    model = load_model(bases["llama"], dtype=torch.float32, device=CPU)
    lora = Lora.model_validate({"init": "kaiming", "r": 4}).resolve()[0]
    assert moe.describe(model, find_targets(model, "all-linear"), lora) == []


def test_runs_that_adapt_experts_share_no_pass(folders, rows, tmp_path):
    requests = [RunRequest(spec(folders("mixtral"), rows), tmp_path / str(i), lambda event: None) for i in range(2)]
    ends = [end for _, end in run_together(requests)]
    assert [type(end) for end in ends] == [GroupMismatch] * 2


def test_inspection_lists_experts_by_the_name_of_their_parameter(folders, tmp_path):
    facts = inspect(str(folders("glm4_moe")), cache=tmp_path)
    found = {target.name: target for target in facts.targets if target.experts}
    assert found["experts.gate_up_proj"].model_dump() == {
        "name": "experts.gate_up_proj", "group": "mlp", "out_features": 128, "in_features": 64, "count": 4,
        "experts": True, "dora": False, "paths": ["model.layers.1.mlp.experts.gate_up_proj"],
    }  # fmt: skip
    assert not {"gate", "router"} & {target.name for target in facts.targets}


def test_resumed_run_on_a_mixture_is_the_same_run(folders, rows, tmp_path):
    whole = spec(folders("qwen3_moe"), rows, training=TRAINING | {"checkpoint_interval": 1})
    run(whole, tmp_path / "whole", lambda event: None)
    half = whole.model_copy(update={"resume_from": str(tmp_path / "whole/checkpoints/step-000002")})
    run(half, tmp_path / "half", lambda event: None)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_recomputed_layers_and_dropout_change_no_gradient_of_an_expert(folders, rows, tmp_path):
    lora = {"dropout": 0.2}
    for kept in (True, False):
        training = TRAINING | {"gradient_checkpointing": not kept}
        run(spec(folders("mixtral"), rows, lora=lora, training=training), tmp_path / str(kept), lambda event: None)
    found = [load_file(tmp_path / str(kept) / "adapter/adapter_model.safetensors") for kept in (True, False)]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-6, rtol=1e-4)
