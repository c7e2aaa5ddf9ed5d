"""What a report says of a whole model does not depend on how much memory there is to look at it."""

import pytest
import torch

from lorainit.config.spec import Lora
from lorainit.data.batches import collate
from lorainit.data.dataset import load
from lorainit.init import report
from lorainit.init.initialize import initialize
from lorainit.model.forward.loss import logits_of, row_losses, tally
from lorainit.model.layers.layer import disabled
from lorainit.model.load import load_model
from lorainit.model.targets.targets import find_targets
from tests.lorainit.conftest import make_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def batch(rows):
    return collate(load(rows, make_tokenizer(), max_length=256).samples[:5], pad=0)


@pytest.fixture
def model(bases, batch):
    """An adapted base of which each output is another than the base's."""
    base = load_model(bases["llama"], dtype=torch.float32, device=CPU)
    lora = Lora.model_validate({"init": "pissa", "r": 4}).resolved()[0]
    initialize(base, find_targets(base, "all-linear"), lora, seed=3, probe=batch, on_event=lambda event: None)
    for module in base.modules():
        if hasattr(module, "A0"):
            module.B.data *= 1.1
    return base


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
    seen = []
    monkeypatch.setattr(report, "logits_of", lambda *args: seen.append(args[1].ids.shape[0]) or logits_of(*args))
    report.measure(model, batch)
    assert seen == [1] * 2 * len(batch.ids)


def test_the_largest_difference_is_that_of_all_rows_and_of_no_padding(model, batch):
    with torch.no_grad():
        after = logits_of(model, batch)
        with disabled(model):
            before = logits_of(model, batch)
    expected = float((before - after)[batch.attention.bool()].abs().max())
    assert expected > 0.1
    assert report.measure(model, batch)["max_abs_logit_difference"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("limit", "fitted"), [(9, [5]), (2, [2, 2, 1]), (1, [1] * 5)])
def test_a_mean_loss_that_does_not_fit_is_looked_at_in_parts(model, batch, limit, fitted):
    whole = tally(model, batch)
    sizes = short_of_memory(model, limit)
    found = report.mean_loss(model, [batch], tick=lambda done: None)
    assert found == pytest.approx(float(whole.loss.detach()) / whole.tokens, rel=1e-5)
    assert sizes == fitted


@pytest.mark.parametrize("limit", [9, 2, 1])
def test_the_loss_before_and_after_a_displaced_start_is_the_same_in_parts(model, batch, limit):
    expected = float(row_losses(model, batch).mean().detach())
    short_of_memory(model, limit)
    found = report.displacement(model, [batch], tick=lambda: None)
    assert found["after"] == pytest.approx(expected, rel=1e-5)
    assert found["rows"] == 5


def test_a_single_row_that_does_not_fit_is_an_error(model, batch):
    short_of_memory(model, 0)
    with pytest.raises(torch.OutOfMemoryError):
        report.mean_loss(model, [batch], tick=lambda done: None)
