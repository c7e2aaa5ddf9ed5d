from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import Gemma2Config, Gemma2ForCausalLM

from lorainit.data.batches import collate
from lorainit.data.reader import load
from lorainit.model.forward import head
from lorainit.model.forward.loss import logits_of, sum_losses, sum_losses_by_adapter
from lorainit.model.load import load_model
from tests.lorainit.conftest import make_tokenizer
from tests.zoo.bases import make


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_loss_is_the_models_own_over_the_trained_tokens(bases, rows, base):
    model = load_model(bases[base], dtype=torch.float32, device=torch.device("cpu"))
    batch = collate(load(rows, make_tokenizer(), max_length=256).samples[:5], pad=0)
    found = sum_losses(model, batch)
    labels = batch.ids.masked_fill(~batch.trained, -100)
    expected = model(input_ids=batch.ids, attention_mask=batch.attention, labels=labels)
    assert found.tokens == int(batch.trained.sum())
    assert found.loss.item() / found.tokens == pytest.approx(float(expected.loss), rel=1e-5)
    right = expected.logits[:, :-1].argmax(-1) == batch.ids[:, 1:]
    assert found.correct == int((right & batch.trained[:, 1:]).sum())


def test_looking_at_trained_positions_only_leaves_the_model_as_it_was(bases, rows):
    model = load_model(bases["llama"], dtype=torch.float32, device=torch.device("cpu"))
    batch = collate(load(rows, make_tokenizer(), max_length=256).samples[:2], pad=0)
    before = logits_of(model, batch)
    with pytest.raises(IndexError):
        sum_losses(model, replace(batch, predicting=batch.predicting + batch.ids.numel()))
    assert torch.equal(logits_of(model, batch), before)


def test_padding_does_not_change_the_loss(bases, rows):
    model = load_model(bases["llama"], dtype=torch.float32, device=torch.device("cpu"))
    samples = load(rows, make_tokenizer(), max_length=256).samples[:6]
    together = sum_losses(model, collate(samples, pad=0))
    alone = [sum_losses(model, collate([sample], pad=0)) for sample in samples]
    assert float(together.loss) == pytest.approx(sum(float(t.loss) for t in alone), rel=1e-5)
    assert together.tokens == sum(t.tokens for t in alone)


def test_logits_in_pieces_are_the_full_loss_and_its_gradient(bases, rows, monkeypatch):
    """And never more of them at once than allowed."""
    model = load_model(bases["llama"], dtype=torch.float32, device=torch.device("cpu")).requires_grad_(False)
    embedding = model.get_input_embeddings().weight.requires_grad_()
    batch = collate(load(rows, make_tokenizer(), max_length=256).samples[:6], pad=0)
    full = model(input_ids=batch.ids, attention_mask=batch.attention).logits[:, :-1][batch.trained[:, 1:]]
    expected = F.cross_entropy(full, batch.targets, reduction="sum")
    (theirs,) = torch.autograd.grad(expected, [embedding])
    assert head.is_plain(model)
    most = []
    linear = F.linear

    def counted(x, weight, bias=None):
        if weight.shape[0] == 320:
            most.append(len(x))
        return linear(x, weight, bias)

    monkeypatch.setattr(head, "LOGITS", 3 * 320)
    monkeypatch.setattr(F, "linear", counted)
    found = sum_losses(model, batch)
    (ours,) = torch.autograd.grad(found.loss, [embedding])
    assert max(most) == 3  # 0: what the stock forward pass is left to do
    assert sum(most) == len(batch.targets)
    assert float(found.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())


def test_several_adapters_rows_are_summed_apart(bases, rows):
    model = load_model(bases["llama"], dtype=torch.float32, device=torch.device("cpu"))
    samples = load(rows, make_tokenizer(), max_length=256).samples[:5]
    counts = [int(s.trained[1:].sum()) for s in samples]
    together = sum_losses_by_adapter(model, collate(samples, pad=0), [counts[0] + counts[1], 0, sum(counts[2:])])
    apart = [sum_losses(model, collate(part, pad=0)) for part in (samples[:2], samples[2:])]
    assert [part.tokens for part in together] == [apart[0].tokens, 0, apart[1].tokens]
    assert float(together[1].loss.detach()) == 0
    for one, two in zip((together[0], together[2]), apart, strict=True):
        assert float(one.loss.detach()) == pytest.approx(float(two.loss.detach()), rel=1e-5)
        assert int(one.correct) == int(two.correct)


@pytest.mark.parametrize(
    ("kind", "plain"), [("opt", True), ("opt-narrow", True), ("gpt2", True), ("gemma2", False), ("granite", False)]
)
def test_whether_logits_are_the_heads_own_is_found_out_without_running_a_layer(kind, plain, tmp_path):
    """OPT runs the decoder inside of its base model; Gemma 2 caps what the head says, Granite scales it."""
    model = load_model(make(kind, tmp_path / kind), dtype=torch.float32, device=torch.device("cpu"))
    ran = []
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.register_forward_hook(lambda *_: ran.append(1))
    assert head.is_plain(model) is plain
    assert not ran


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "gemma2"])
def test_a_model_that_stock_peft_wraps_has_the_loss_of_the_whole_adapted_model(kind, rows, tmp_path):
    """The benchmarks judge adapters that way."""
    base = load_model(make(kind, tmp_path / kind), dtype=torch.float32, device=torch.device("cpu"))
    plain = head.is_plain(base)
    options = {"task_type": "CAUSAL_LM", "init_lora_weights": False, "fan_in_fan_out": kind == "gpt2"}
    config = LoraConfig(r=2, target_modules="all-linear", **options)
    wrapped = get_peft_model(base, config).eval()
    batch = collate(load(rows, make_tokenizer(), max_length=64, on_row_error="skip").samples[:3], pad=0)
    labels = batch.ids.masked_fill(~batch.trained, -100)
    expected = wrapped(input_ids=batch.ids, attention_mask=batch.attention, labels=labels).loss
    found = sum_losses(wrapped, batch)
    assert float(found.loss.detach()) / found.tokens == pytest.approx(float(expected.detach()), rel=1e-5)
    assert head.is_plain(wrapped) is plain


@pytest.mark.parametrize("change", [{"final_logit_softcapping": 5.0}, {"final_logit_softcapping": None}], ids=str)
def test_an_architecture_that_changes_its_logits_gets_the_loss_of_the_changed_ones(rows, change):
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, pad_token_id=0, initializer_range=0.5, **change,
        )
    ).eval().requires_grad_(False)  # fmt: skip
    batch = collate(load(rows, make_tokenizer(), max_length=256).samples[:3], pad=0)
    labels = batch.ids.masked_fill(~batch.trained, -100)
    expected = model(input_ids=batch.ids, attention_mask=batch.attention, labels=labels).loss
    found = sum_losses(model, batch)
    assert float(found.loss) / found.tokens == pytest.approx(float(expected), rel=1e-5)
    assert head.is_plain(model) is (change["final_logit_softcapping"] is None)
