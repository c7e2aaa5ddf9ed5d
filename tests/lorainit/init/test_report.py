"""What a report says of a whole model does not depend on how much memory there is to look at it."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import Gemma2Config, Gemma2ForCausalLM

from lorainit.config.spec import Lora
from lorainit.data.batches import collate
from lorainit.data.reader import load
from lorainit.init import report
from lorainit.init.initialize import initialize
from lorainit.model.forward.loss import logits_of, row_losses, sum_losses
from lorainit.model.layers.layer import disable_adapters
from lorainit.model.load import load_model
from lorainit.model.targets.targets import find_targets
from tests.lorainit.conftest import make_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def batch(rows):
    return collate(load(rows, make_tokenizer(), max_length=256).samples[:5], pad=0)


def tiny_gemma2_capped():
    """A model that caps what its head says."""
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, pad_token_id=0, initializer_range=0.5, final_logit_softcapping=5.0,
        )
    ).eval().requires_grad_(False)  # fmt: skip


@torch.no_grad()
def moved(model, batch):
    """The largest difference, from logits of all rows at once."""
    after = logits_of(model, batch)
    with disable_adapters(model):
        before = logits_of(model, batch)
    return float((before - after)[batch.attention.bool()].abs().max())


def adapted(base, batch):
    """The base, adapted so that each output is another than the base's."""
    lora = Lora.model_validate({"init": "pissa", "r": 4}).resolve()[0]
    initialize(base, find_targets(base, "all-linear"), lora, seed=3, probe=batch, on_event=lambda event: None)
    for module in base.modules():
        if hasattr(module, "A0"):
            module.B.data *= 1.1
    return base


@pytest.fixture
def model(bases, batch):
    return adapted(load_model(bases["llama"], dtype=torch.float32, device=CPU), batch)


def short_of_memory(model, limit):
    """Passes over more rows run out of memory; returns how many rows each pass had that did not."""
    fitted = []

    def allocate(_module, _args, named):
        if len(named["input_ids"]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        fitted.append(len(named["input_ids"]))

    model.register_forward_pre_hook(allocate, with_kwargs=True)
    return fitted


def test_whole_logits_are_made_of_one_row_at_a_time(model, batch, monkeypatch):
    seen, linear = [], F.linear

    def counted(x, weight, bias=None):
        if weight is model.get_output_embeddings().weight:
            seen.append(len(x))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", counted)
    report.measure(model, batch)
    rows, length = batch.ids.shape
    passes, whole = seen[: -2 * rows], seen[-2 * rows :]
    assert set(passes) == {0, len(batch.targets)}
    assert whole == [length] * 2 * rows


def test_the_base_and_the_adapted_model_are_each_run_once_for_losses_and_logits(model, batch):
    passes = short_of_memory(model, len(batch.ids))
    report.measure(model, batch)
    assert passes == [len(batch.ids)] * 2


def test_logits_that_the_architecture_changes_are_compared_as_changed(batch):
    torch.manual_seed(0)
    model = adapted(tiny_gemma2_capped(), batch)
    assert report.measure(model, batch)["max_abs_logit_difference"] == pytest.approx(moved(model, batch), rel=1e-5)


def test_the_largest_difference_is_that_of_all_rows_and_of_no_padding(model, batch):
    expected = moved(model, batch)
    assert expected > 0.1
    assert report.measure(model, batch)["max_abs_logit_difference"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("limit", "fitted"), [(9, [5]), (2, [2, 2, 1]), (1, [1] * 5)])
def test_a_mean_loss_that_does_not_fit_is_looked_at_in_parts(model, batch, limit, fitted):
    whole = sum_losses(model, batch)
    sizes = short_of_memory(model, limit)
    found = report.mean_loss(model, [batch], tick=lambda done: None)
    assert found == pytest.approx(float(whole.loss.detach()) / whole.tokens, rel=1e-5)
    assert sizes == fitted


@pytest.mark.parametrize("limit", [9, 2, 1])
def test_the_loss_before_and_after_a_displaced_start_is_the_same_in_parts(model, batch, limit):
    expected = float(row_losses(model, batch).mean().detach())
    short_of_memory(model, limit)
    found = report.measure_displacement(model, [batch], tick=lambda: None)
    assert found["after"] == pytest.approx(expected, rel=1e-5)
    assert found["rows"] == 5


def test_a_single_row_that_does_not_fit_is_an_error(model, batch):
    short_of_memory(model, 0)
    with pytest.raises(torch.OutOfMemoryError):
        report.mean_loss(model, [batch], tick=lambda done: None)
