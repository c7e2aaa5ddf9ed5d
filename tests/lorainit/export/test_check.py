"""The check of every download: it passes for the right adapter, and for none that differs in any one respect."""

import json
import shutil
from contextlib import suppress
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorainit.config.errors import ExportCheckFailed
from lorainit.config.spec import Lora
from lorainit.export.check import check, require
from lorainit.export.early_check import make_trial_adapter
from lorainit.export.effect import observe
from lorainit.export.float64 import compute_in, find_widest_dtype
from lorainit.export.peft_adapter import export
from lorainit.model.layers import experts
from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import LoRALinear
from lorainit.model.layers.weight import weight_of
from lorainit.model.layout import choose_layout
from lorainit.model.load import load_model
from lorainit.model.targets.targets import find_targets
from lorainit.runtime.devices import make_generator
from tests.zoo.bases import make

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
TEXTS = [torch.arange(5, 29) + 3 * i for i in range(3)]
Q, K = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj"
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def silent(_event) -> None:
    """Nobody listens."""


def layers_of(model, *, targets="all-linear", step=None, **lora):
    """Layers away from their start: far, or by one small step."""
    wanted = Lora.model_validate({"init": "kaiming", "r": 4, **lora}).resolve()[0]
    found = {name: module for name, module in find_targets(model, targets).items() if min(weight_of(module).shape) >= 4}
    layers = make_trial_adapter(found, wanted, device=CPU)
    return layers if step is None else {name: stepped(name, layer, step) for name, layer in layers.items()}


@torch.no_grad()
def stepped(name, layer, step):
    """From B = 0, or from a start that is subtracted, one step of this size."""
    subtract, dora = layer.A0 is not None, layer.magnitude is not None
    B = layer.B if subtract else torch.zeros_like(layer.B)
    young = LoRALinear(layer.base, Factors(layer.A, B), scale=layer.scale, subtract=subtract, dora=dora)
    generator = make_generator(1, name)
    for parameter in young.trained_parameters().values():
        parameter.add_(step * torch.randn(parameter.shape, generator=generator))
    return young


def exported(base, folder, *, dtype=FP32, targets="all-linear", step=None, **lora):
    """The effect of an adapter on a base as runs hold it, and its download in `folder`."""
    model = load_model(base, dtype=dtype, device=CPU, quantization=lora.get("quantization"))
    experts.install(model)
    choose_layout(model)
    layers = layers_of(model, targets=targets, step=step, **lora)
    export(model, layers, folder, root="tests/base")
    return observe(model, layers, TEXTS, divided=False, on_event=silent)


def checked(base, folder, effect, *, dtype=FP32, spoil=None, **lora):
    """What the check says of a download, with stock PEFT on a fresh base."""
    fresh = load_model(base, dtype=dtype, device=CPU, **lora)
    if spoil:
        with torch.no_grad():
            spoil(fresh)
    return check(fresh, folder, effect, source_rank=4, base_sha256="x", on_event=silent)[0]


# --- what must fail ------------------------------------------------------------------------------

YOUNG = 1e-5  # one step at this learning rate
FORMS = {
    "plain": {},
    "difference": {"init": "pissa"},
    "dora": {"use_dora": True},
    "young": {"step": YOUNG},
    "young difference": {"step": YOUNG, "init": "pissa"},
    "young dora": {"step": YOUNG, "use_dora": True},
}


@pytest.fixture(scope="module", params=FORMS)
def download(request, downloads):
    """An adapter in each form, far from its start or one step away: its effect and its folder."""
    return downloads(request.param)


@pytest.fixture(scope="module")
def downloads(bases, tmp_path_factory):
    """Makes the download of a form, once."""

    @cache
    def make_download(form):
        folder = tmp_path_factory.mktemp("download")
        return exported(bases["llama"], folder, **FORMS[form]), folder

    return make_download


def in_file(change):
    """A mutant of the tensors; `change` gets them by the names of the base's modules."""

    def mutate(folder):
        prefix = "base_model.model."
        tensors = {n.removeprefix(prefix): t for n, t in load_file(folder / FILE).items()}
        change(tensors)
        save_file({prefix + n: t.contiguous() for n, t in tensors.items()}, folder / FILE)

    return mutate


def in_config(change):
    def mutate(folder):
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return mutate


def exchange(tensors):
    for part in ("lora_A.weight", "lora_B.weight"):
        one, two = f"{Q.format(0)}.{part}", f"{Q.format(1)}.{part}"
        tensors[one], tensors[two] = tensors[two], tensors[one]


def drop_all(tensors):
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()


MUTANTS = {
    "a layer without its product": in_file(lambda t: t[f"{K.format(1)}.lora_B.weight"].zero_()),
    "a factor of 1.02 on one layer": in_file(lambda t: t[f"{K.format(1)}.lora_B.weight"].mul_(1.02)),
    "two layers exchanged": in_file(exchange),
    "a rank exchanged": in_file(lambda t: t.update({(n := f"{Q.format(0)}.lora_A.weight"): t[n].flip(0)})),
    "no adapter at all": in_file(drop_all),
    "another alpha": in_config(lambda c: c.update(lora_alpha=1.02 * c["lora_alpha"])),
    "rsLoRA in the configuration only": in_config(lambda c: c.update(use_rslora=True)),
}


def is_usual(form, mutant):
    """Each mutant of a form is tried far from the start or young, in turn; the other of the two is slow."""
    place, turn = list(FORMS).index(form), list(MUTANTS).index(mutant)
    return place // 3 == (place % 3 + turn) % 2


@pytest.mark.parametrize(
    ("form", "mutant"),
    [
        pytest.param(form, mutant, marks=() if is_usual(form, mutant) else pytest.mark.slow)
        for form in FORMS
        for mutant in MUTANTS
    ],
)
def test_a_download_that_differs_in_one_respect_does_not_pass(bases, downloads, tmp_path, form, mutant):
    effect, right = downloads(form)
    folder = shutil.copytree(right, tmp_path / "wrong")
    MUTANTS[mutant](folder)
    result = checked(bases["llama"], folder, effect)
    assert [loader["loaded"] for loader in result["loaders"]] == [True]  # PEFT itself has nothing against it
    assert not result["passed"]
    with pytest.raises(ExportCheckFailed, match=r"self_attn|mlp"):
        require(result)


def test_the_right_download_passes_in_every_form(bases, download):
    result = checked(bases["llama"], download[1], download[0])
    require(result)
    assert (result["modules"], result["prompts"], result["tokens"], result["tokens_apart"]) == (14, 3, 72, 0)
    assert result["max_module_difference"] < 1e-7
    assert result["max_abs_logit_difference"] < 1e-3 * result["max_abs_logit_effect"]


def test_a_factor_the_wrong_way_round_does_not_pass_where_it_is_square(bases, tmp_path):
    effect = exported(bases["llama"], tmp_path, r=16)  # k_proj gives 16 numbers
    name = f"{K.format(0)}.lora_B.weight"
    in_file(lambda t: t.update({name: t[name].T}))(tmp_path)
    assert checked(bases["llama"], tmp_path, effect)["message"].startswith(f"{K.format(0)}: what it adds differs")


def test_a_download_without_one_of_the_layers_does_not_pass(bases, tmp_path):
    effect = exported(bases["llama"], tmp_path)
    gone = K.format(1)
    in_file(lambda t: [t.pop(n) for n in list(t) if n.startswith(gone)])(tmp_path)
    names = [name for name in effect.changes if name != gone]
    in_config(lambda c: c.update(target_modules=names))(tmp_path)
    assert checked(bases["llama"], tmp_path, effect)["message"].startswith(f"{gone} was trained, and is not")


def test_magnitudes_of_dora_that_are_two_percent_off_do_not_pass(bases, tmp_path):
    effect = exported(bases["llama"], tmp_path, use_dora=True)
    in_file(lambda t: t[f"{Q.format(0)}.lora_magnitude_vector"].mul_(1.02))(tmp_path)
    assert checked(bases["llama"], tmp_path, effect)["message"].startswith(f"{Q.format(0)}: what it adds differs")


def test_tensors_that_no_loader_reads_are_noticed_though_they_do_nothing(bases, tmp_path):
    effect = exported(bases["llama"], tmp_path, step=0.0)
    first = f"{Q.format(0)}.lora_A.weight"
    in_file(lambda t: t.update({first.replace("layers.0", "layers.9"): t.pop(first)}))(tmp_path)
    result = checked(bases["llama"], tmp_path, effect)
    assert result["max_abs_logit_difference"] == result["max_abs_logit_effect"] == 0.0
    assert not result["passed"]


@pytest.mark.parametrize(
    ("module", "text"),
    [(Q.format(1), f"{Q.format(1)}: the base model's own layer differs"), ("model.norm", "the logits of")],
    ids=["adapted", "not adapted"],
)
def test_a_base_that_is_another_one_does_not_pass(bases, tmp_path, module, text):
    def spoil(model):
        model.get_submodule(module).weight.flatten()[3] *= 1.01

    effect = exported(bases["llama"], tmp_path)
    assert checked(bases["llama"], tmp_path, effect, spoil=spoil)["message"].startswith(text)


def test_what_peft_cannot_load_ends_in_its_own_words(bases, tmp_path):
    effect = exported(bases["llama"], tmp_path)
    in_config(lambda c: c.update(target_modules=["no_such_layer"]))(tmp_path)
    result = checked(bases["llama"], tmp_path, effect)
    assert result["loaders"][0]["loaded"] is False
    assert result["message"].startswith(
        "loading it failed: NoMatchingPeftModuleError: Target modules {'no_such_layer'}"
    )


# --- no false alarm ------------------------------------------------------------------------------

EXPERTS = ["experts.gate_up_proj", "experts.down_proj", "q_proj", "k_proj"]
ZOO = {
    **dict.fromkeys(["gemma3", "gpt_neox", "falcon", "mpt", "opt", "phi3-longrope"], "attention"),
    **dict.fromkeys(["mixtral", "qwen3_moe", "gpt_oss"], EXPERTS),
    "deepseek_v3": ["experts.gate_up_proj", "experts.down_proj", "o_proj"],
}
USUAL = ("gemma3", "mpt", "opt", "mixtral", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize(
    "kind", [kind if kind in USUAL else pytest.param(kind, marks=pytest.mark.slow) for kind in ZOO]
)
def test_in_bf16_the_right_download_passes_whatever_the_run_rounds(tmp_path, kind):
    """Mixtures choose other experts for some tokens in two bf16 computations; in these numbers they do not."""
    base = make(kind, tmp_path / "base")
    effect = exported(base, tmp_path / "adapter", dtype=BF16, targets=ZOO[kind])
    assert any(".experts." in name for name in effect.changes) == (ZOO[kind] != "attention")
    result = checked(base, tmp_path / "adapter", effect, dtype=BF16)
    require(result)
    assert (result["arithmetic"], result["tokens_apart"]) == ("fp64", 0)
    assert 1e-3 < result["precision_noise"] < 10
    assert result["relative_logit_difference"] < 1e-3


def expert(t, number):
    """One expert's columns of B: column k·E + e is column k of expert e of E."""
    name = "model.layers.1.mlp.experts.lora_B.weight"  # the later of the module's two parameters is outermost
    return t[name].unflatten(1, (-1, 4))[..., number]


def swap_experts(t):
    one = expert(t, 0).clone()
    expert(t, 0).copy_(expert(t, 3))
    expert(t, 3).copy_(one)


MIXTURE_MUTANTS = {
    "a layer two percent off": (lambda t: t[f"{K.format(1)}.lora_B.weight"].mul_(1.02), K.format(1)),
    "one expert two percent off": (lambda t: expert(t, 2).mul_(1.02), "model.layers.1.mlp.experts.down_proj.2"),
    "two experts exchanged": (swap_experts, "model.layers.1.mlp.experts.down_proj.0"),
}


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def mixture(request, tmp_path_factory):
    """A mixture, the effect of a young adapter on it, and the adapter's download."""
    folder = tmp_path_factory.mktemp("mixture")
    base = make(request.param, folder / "base")
    return base, exported(base, folder / "right", dtype=BF16, targets=EXPERTS, step=YOUNG), folder / "right"


@pytest.mark.parametrize("mutant", MIXTURE_MUTANTS)
def test_in_bf16_a_mixture_that_differs_in_one_respect_does_not_pass(mixture, tmp_path, mutant):
    base, effect, right = mixture
    folder = shutil.copytree(right, tmp_path / "wrong")
    change, name = MIXTURE_MUTANTS[mutant]
    in_file(change)(folder)
    assert checked(base, folder, effect, dtype=BF16)["message"].startswith(f"{name}: what it adds")


NF4 = {"quantization": "nf4"}


EVERY = [
    {}, {"init": "pissa"}, {"use_dora": True}, {"init": "eva"}, NF4, {"init": "pissa", **NF4}, {"init": "eva", **NF4},
]  # fmt: skip


@pytest.mark.parametrize(
    ("base", "lora"),
    [
        # Each kind of layer and each of these in turn: the rest is slow.
        (base, lora) if turn % 2 == place else pytest.param(base, lora, marks=pytest.mark.slow)
        for place, base in enumerate(("wide-llama", "wide-gpt2"))
        for turn, lora in enumerate(EVERY)
    ],
    ids=str,
)
def test_the_right_download_passes_on_either_kind_of_layer_whole_or_in_four_bits(bases, tmp_path, base, lora):
    """With EVA's mixed ranks too; the difference form has twice the rank."""
    effect = exported(bases[base], tmp_path, **lora)
    require(checked(bases[base], tmp_path, effect, quantization=lora.get("quantization")))


# --- exact arithmetic ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_exact_logits_are_those_of_stock_transformers_in_float64(bases, base, dtype):
    model = load_model(bases[base], dtype=dtype, device=CPU)
    choose_layout(model)
    with torch.no_grad():
        with compute_in(model, torch.float64):
            found = model(input_ids=TEXTS[0][None]).logits
        wanted = load_model(bases[base], dtype=dtype, device=CPU).double()(input_ids=TEXTS[0][None]).logits
    assert found.dtype == torch.float64
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_model_is_bit_for_bit_what_it_was_afterwards_even_after_an_error(bases):
    model = load_model(bases["wide-llama"], dtype=BF16, device=CPU, quantization="nf4")
    before = [(name, tensor, tensor.clone()) for name, tensor in model.named_parameters()]
    modules = list(model.named_modules())
    with suppress(IndexError), compute_in(model, torch.float64):
        model(input_ids=torch.tensor([[10**6]]))
    assert find_widest_dtype(model, TEXTS[0]) == torch.float64
    assert list(model.named_modules()) == modules
    after = dict(model.named_parameters())
    for name, tensor, value in before:
        assert after[name] is tensor
        assert tensor.dtype == value.dtype
        assert torch.equal(tensor, value), name


def test_an_architecture_that_cannot_compute_in_float64_is_checked_in_float32(tmp_path):
    base = make("xglm", tmp_path / "base")
    assert find_widest_dtype(load_model(base, dtype=BF16, device=CPU), TEXTS[0]) == FP32
    effect = exported(base, tmp_path / "adapter", dtype=BF16, targets="attention")
    result = checked(base, tmp_path / "adapter", effect, dtype=BF16)
    require(result)
    assert result["arithmetic"] == "fp32"


# --- what is written -----------------------------------------------------------------------------


def test_targets_whose_suffix_also_names_other_layers_are_written_in_full(bases, tmp_path):
    model = load_model(bases["gpt2"], dtype=torch.float32, device=CPU)
    layers = layers_of(model, targets="attention")
    export(model, layers, tmp_path, root="tests/gpt2")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(layers)
    assert config["fan_in_fan_out"] is True


def test_weight_of_conv1d_is_out_by_in(bases):
    model = load_model(bases["gpt2"], dtype=torch.float32, device=CPU)
    module = find_targets(model, ["c_fc"])["transformer.h.0.mlp.c_fc"]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(module(x), x @ weight_of(module).T + module.bias, atol=1e-6)
