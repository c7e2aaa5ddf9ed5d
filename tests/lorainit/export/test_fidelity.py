"""What is left of an adapter in bf16: the dead zone with stock PEFT, and what is said about it."""

import warnings
from collections import Counter

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lorainit.config.errors import ExportCheckFailed
from lorainit.config.events import Message
from lorainit.config.spec import Lora, RunSpec
from lorainit.data.batches import collate
from lorainit.data.dataset import Dataset, Sample
from lorainit.data.reader import load
from lorainit.export import early_check, fidelity
from lorainit.export.check import load_with_stock_peft
from lorainit.export.fidelity import HeldOut, choose_held_out, measure, measure_token_losses
from lorainit.export.peft_adapter import export
from lorainit.init.initialize import initialize
from lorainit.model.forward import attention
from lorainit.model.layers.layer import adapted_layers, weight_of
from lorainit.model.load import load_model
from lorainit.model.targets.targets import find_linear_layers, find_targets
from lorainit.run import run
from tests.lorainit.conftest import chat, make_tokenizer, write_rows

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
LOSSES = {f"{n}_loss" for n in ("base", "trained", "merged_fp32", "base_bf16", "unmerged_bf16", "merged_bf16")}
KEPT = {"kept_unmerged_bf16", "kept_merged_bf16"}
YOUNG = {"max_steps": 4, "learning_rate": 2e-5}
GROWN = {"max_steps": 30, "learning_rate": 1e-2}


def silent(event):
    return None


# --- whole runs: the dead zone ------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """One model of weights of an everyday size (0.1), stored in float32 and in bf16, and rows with one lesson."""
    folder = tmp_path_factory.mktemp("stored")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )
    )  # fmt: skip
    for name, dtype in {"fp32": FP32, "bf16": BF16}.items():
        model.to(dtype).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    write_rows(folder / "rows.jsonl", [chat(f"What is {i}?", " ".join(["the cat sat"] * 12)) for i in range(10)])
    return folder


@pytest.fixture(scope="module")
def trained(stored, tmp_path_factory):
    """`trained("bf16", YOUNG)`: the facts and the sentence of a run on the base stored in bf16."""
    done = {}

    def go(name, training, **lora):
        key = name, str(training), str(lora)
        if key not in done:
            spec = RunSpec.model_validate(
                {
                    "model": {"id": "x", "source": str(stored / name), "root": "tests/x", "max_length": 256},
                    "data": {"training": str(stored / "rows.jsonl")},
                    "lora": {"init": "kaiming", "r": 8, "alpha": 16.0, **lora},
                    "training": {"batch_size": 8, "warmup_ratio": 0.0, "lr_scheduler": "constant", **training},
                }
            )
            events = []
            out = tmp_path_factory.mktemp("run")
            facts = run(spec, out, events.append).export_check["fidelity"]
            (said,) = [e for e in events if isinstance(e, Message) and "fidelity" in e.data]
            done[key] = facts, said, out / "adapter"
        return done[key]

    return go


def test_a_young_adapter_is_mostly_lost_unmerged_on_a_bf16_base_and_the_run_warns(trained):
    facts, said, _ = trained("fp32", YOUNG)
    assert facts["kept_unmerged_bf16"] + 2 * facts["kept_unmerged_bf16_error"] < 0.5
    assert (said.level, said.data["kind"], said.data["fidelity"]) == ("warn", "export", facts)
    assert f"shows {facts['kept_unmerged_bf16']:.0%} when served unmerged on a bf16 base" in said.message


def test_merging_in_fp32_keeps_it_where_the_base_has_more_bits_than_bf16_and_that_is_the_advice(trained):
    """Its weights lie anywhere between two numbers of bf16, so small updates round some of them the other way."""
    facts, said, _ = trained("fp32", YOUNG)
    assert facts["kept_merged_bf16"] > 0.8
    assert said.message.endswith("Merge it into the base model in fp32 before casting, or serve it in fp32.")


def test_merging_loses_it_too_where_the_base_is_stored_in_bf16(trained):
    facts, said, _ = trained("bf16", YOUNG)
    assert facts["kept_merged_bf16"] + 2 * facts["kept_merged_bf16_error"] < 0.5
    assert said.level == "warn"
    assert "when merged in fp32 and cast to bf16" in said.message
    assert said.message.endswith("Serve it in fp32, merged or not.")


@pytest.mark.parametrize("name", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_strongly_trained_adapter_is_kept_either_way(trained, name):
    facts, said, _ = trained(name, GROWN)
    assert facts["base_loss"] - facts["trained_loss"] > 1
    assert all(0.95 <= facts[kept] <= 1.05 for kept in KEPT)
    assert said.level == "info"


@pytest.mark.parametrize("lora", [{}, {"init": "eva", "use_dora": True}, {"init": "pissa"}], ids=str)
def test_merged_in_fp32_is_the_trained_model(trained, lora):
    facts, _, _ = trained("fp32", GROWN if not lora else {**GROWN, "max_steps": 8}, **lora)
    assert facts["base_loss"] - facts["trained_loss"] > 0.3
    assert facts["missing"] == {}
    assert abs(facts["merged_fp32_loss"] - facts["trained_loss"]) < 1e-4


def test_every_loss_is_what_a_user_of_stock_peft_would_measure(stored, trained):
    facts, _, adapter = trained("bf16", YOUNG)
    rows = choose_held_out(load(stored / "rows.jsonl", make_tokenizer(), max_length=256), None)

    def mean(model):
        losses = [model(input_ids=s.ids.long()[None], labels=labels(s)[None]).loss for s in rows.samples]
        counts = torch.tensor([float(s.trained[1:].sum()) for s in rows.samples])
        return float((torch.stack(losses).float() * counts).sum() / counts.sum())

    def labels(sample):
        return torch.where(sample.trained, sample.ids.long(), -100)

    with torch.no_grad():
        base = load_model(stored / "bf16", dtype=BF16, device=CPU)
        assert mean(base) == pytest.approx(facts["base_bf16_loss"], abs=1e-5)
        assert mean(load_with_stock_peft(base, adapter)) == pytest.approx(facts["unmerged_bf16_loss"], abs=1e-5)
        merged = load_with_stock_peft(load_model(stored / "bf16", dtype=FP32, device=CPU), adapter).merge_and_unload()
        assert mean(merged) == pytest.approx(facts["merged_fp32_loss"], abs=1e-5)
        for parameter in merged.parameters():
            parameter.data = parameter.data.bfloat16()
        assert mean(merged) == pytest.approx(facts["merged_bf16_loss"], abs=1e-5)


def test_a_run_in_bf16_measures_one_format_and_trains_float32_factors(trained):
    facts, _, adapter = trained("bf16", {**GROWN, "precision": "bf16"})
    assert facts["precision"] == "bf16"
    assert facts["base_loss"] == facts["base_bf16_loss"]
    assert facts["missing"] == {"merged_fp32_loss": "the run is not in fp32"}
    assert all(0.95 <= facts[kept] <= 1.05 for kept in KEPT)
    assert {tensor.dtype for tensor in load_file(adapter / "adapter_model.safetensors").values()} == {FP32}


@pytest.fixture(scope="module")
def on_four_bits(spec, rows, tmp_path_factory):
    """The facts of a run on a base in NF4 with validation rows."""
    lora, training = {"init": "kaiming", "quantization": "nf4"}, {**GROWN, "checkpoint_interval": 100}
    asked = spec("wide-llama", lora=lora, training=training, data={"validation": str(rows)})
    return run(asked, tmp_path_factory.mktemp("nf4"), silent).export_check["fidelity"]


def test_an_nf4_run_measures_the_base_it_was_trained_on_and_says_why_nothing_is_merged(on_four_bits):
    facts = on_four_bits
    assert facts["base_loss"] - facts["trained_loss"] > 1
    assert facts["kept_unmerged_bf16"] == pytest.approx(1, abs=0.05)
    assert facts["missing"].keys() == {"merged_fp32_loss", "merged_bf16_loss", "kept_merged_bf16"}
    assert all("four bits" in reason for reason in facts["missing"].values())


def test_validation_rows_are_used_where_there_are_some(on_four_bits):
    assert (on_four_bits["data"], on_four_bits["rows"]) == ("validation", 12)


# --- merging ------------------------------------------------------------------------------------


@pytest.fixture
def samples(rows):
    return load(rows, make_tokenizer(), max_length=256).samples


def an_adapter(folder, out, samples, *, size=0.05, **lora):
    """An exported adapter away from its start, and the losses of the model that carries it."""
    model = load_model(folder, dtype=FP32, device=CPU)
    wanted = Lora.model_validate({"init": "kaiming", "r": 4, **lora}).resolve()[0]
    targets = find_targets(model, "all-linear")
    initialize(model, targets, wanted, seed=0, probe=collate(samples[:2], pad=0), on_event=silent)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for parameter in layer.trained_parameters().values():
                parameter += size * torch.randn(parameter.shape, generator=generator)
    export(model, adapted_layers(model), out, root="tests/x")
    return measure_token_losses(model, HeldOut("training", samples), on_event=silent)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_merged_weights_are_stock_pefts(bases, samples, tmp_path, base, dora):
    an_adapter(bases[base], tmp_path, samples, use_dora=dora)
    model = load_model(bases[base], dtype=FP32, device=CPU)
    before = {name: weight_of(module).clone() for name, module in find_linear_layers(model).items()}
    adapted_model = load_with_stock_peft(model, tmp_path)
    fidelity._merge(adapted_model, bases[base], on_event=silent)
    ours = {n: weight_of(m.get_base_layer()) for n, m in adapted_model.named_modules() if hasattr(m, "get_base_layer")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = load_model(bases[base], dtype=FP32, device=CPU)
        theirs = find_linear_layers(PeftModel.from_pretrained(fresh, tmp_path).merge_and_unload())
    assert ours.keys() == {f"base_model.model.{name}" for name in theirs}
    for name, module in theirs.items():
        merged = ours[f"base_model.model.{name}"]
        assert (merged - before[name]).abs().max() > 1e-2
        assert torch.allclose(merged, weight_of(module), rtol=1e-5, atol=1e-6), name


# --- shares and their limits --------------------------------------------------------------------


def facts_of(base, folder, samples, losses, **more):
    said = []
    options = {"dtype": FP32, "device": CPU, **more}
    facts = measure(base, folder, HeldOut("training", samples), losses, on_event=said.append, **options)
    (message,) = [event for event in said if isinstance(event, Message)]
    return facts, message


def test_without_a_gain_there_is_no_share_but_all_losses(bases, samples, tmp_path):
    losses = an_adapter(bases["llama"], tmp_path, samples, size=0.0)
    facts, said = facts_of(bases["llama"], tmp_path, samples, losses)
    assert facts["unmerged_bf16_loss"] == facts["base_bf16_loss"]
    assert facts["missing"] == dict.fromkeys(KEPT, "the training did not lower the loss of these rows")
    assert said.level == "info"
    assert said.message.endswith(": the training did not lower the loss of these rows.")


def test_a_gain_as_small_as_rounding_has_no_share(bases, samples, tmp_path):
    losses = an_adapter(bases["llama"], tmp_path, samples, size=0.0)
    rounding = 1e-3 * torch.randn(losses.shape, generator=torch.Generator().manual_seed(0)).double()
    losses += rounding - rounding.mean() - 1e-5
    facts, said = facts_of(bases["llama"], tmp_path, samples, losses)
    assert all(facts[kept] is facts[f"{kept}_error"] is None for kept in KEPT)
    assert facts["missing"].keys() == KEPT
    assert "a gain of 1e-05 nats is too small to tell from rounding" in said.message


def test_one_token_has_no_share(bases, samples, tmp_path):
    sample = Sample(1, samples[0].ids[:2], torch.tensor([False, True]))
    losses = an_adapter(bases["llama"], tmp_path, samples)[:1] - 100
    facts, _ = facts_of(bases["llama"], tmp_path, [sample], losses)
    assert facts["tokens"] == 1
    assert facts["kept_unmerged_bf16"] is None


def test_share_and_error_are_those_of_the_gains_token_by_token():
    base, gains = torch.full((4,), 2.0).double(), torch.tensor([0.1, 0.3, 0.2, 0.2]).double()
    shown = torch.tensor([0.05, 0.15, 0.12, 0.08]).double()
    found = {"base": base, "trained": base - gains, "base_bf16": base + 1, "unmerged_bf16": base + 1 - shown}
    share, error = fidelity._kept(found, "unmerged_bf16")
    assert share == pytest.approx(0.5)
    assert error == pytest.approx(float((shown - gains).std()) / 2 / 0.2)


def test_without_bf16_what_it_would_lose_is_not_measured_and_the_facts_say_why(bases, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "has_bf16", lambda device: False)
    losses = an_adapter(bases["llama"], tmp_path, samples)
    facts, said = facts_of(bases["llama"], tmp_path, samples, losses)
    assert facts["merged_fp32_loss"] == pytest.approx(facts["trained_loss"], abs=1e-4)
    wanted = KEPT | {name for name in LOSSES if "bf16" in name}
    assert facts["missing"] == dict.fromkeys(wanted, "this device has no bf16")
    assert all(facts[name] is None for name in wanted)
    assert said.level == "info"


def test_without_a_trained_token_within_reach_nothing_is_measured(bases, samples, tmp_path):
    an_adapter(bases["llama"], tmp_path, samples)
    facts, _ = facts_of(bases["llama"], tmp_path, [], torch.empty(0))
    assert facts["missing"].keys() == LOSSES | KEPT
    assert all("last 1024 tokens" in reason for reason in facts["missing"].values())


def a_file(*lengths, trained=2):
    """Rows of these lengths whose last `trained` tokens are trained."""
    samples = [Sample(i, torch.arange(n), torch.arange(n) >= n - trained) for i, n in enumerate(lengths)]
    return Dataset(samples, "", len(samples), 0, [], Counter(), [])


def test_rows_are_the_first_ones_within_bounds():
    assert len(choose_held_out(a_file(*[5] * 50), None).samples) == 32
    chosen = choose_held_out(a_file(600, 300, 700, 10), None).samples
    assert [len(s.ids) for s in chosen] == [600, 300, 124]


def test_a_long_row_keeps_its_end():
    (sample,) = choose_held_out(a_file(5000), None).samples
    assert torch.equal(sample.ids, torch.arange(5000)[-1024:])
    assert sample.trained.sum() == 2


def test_rows_without_a_trained_token_in_reach_are_passed_over():
    data = a_file(6, 8)
    far = Sample(0, torch.arange(2000), torch.arange(2000) < 9)
    mixed = Dataset([far, *data.samples], "", 3, 0, [], Counter(), [])
    assert [len(s.ids) for s in choose_held_out(mixed, None).samples] == [6, 8]


def test_a_loss_that_stock_transformers_does_not_find_fails_the_run(spec, tmp_path, monkeypatch):
    """The last gate: an engine that computes something else than the base passes every check of an adapter."""

    def begin(job, *args, **named):
        monkeypatch.setattr(attention, "_mask", lambda queries, before, *_: torch.zeros(queries, before + queries))
        return prove(job, *args, **named)

    prove = early_check.check_export_early  # after the layout was chosen, which would have noticed
    monkeypatch.setattr(early_check, "check_export_early", begin)
    with pytest.raises(ExportCheckFailed, match="as stock transformers computes it"):
        run(spec("llama", lora={"init": "kaiming"}), tmp_path / "out", lambda event: None)


def test_a_run_whose_base_does_not_run_in_bf16_succeeds_and_says_so(spec, tmp_path, monkeypatch):
    def measure(*args, **named):
        raise RuntimeError("expected m1 and m2 to have the same dtype")

    monkeypatch.setattr("lorainit.export.fidelity.measure", measure)
    events = []
    done = run(spec("llama"), tmp_path / "out", events.append)
    assert "expected m1 and m2" in done.export_check["fidelity"]["missing"]["kept_unmerged_bf16"]
    assert any("expected m1 and m2" in getattr(event, "message", "") for event in events)
