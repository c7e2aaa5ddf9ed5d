from dataclasses import replace

import pytest
import torch

from lorainit.batches import collate
from lorainit.data import load
from lorainit.loss import logits_of, tally
from lorainit.model import load_model
from tests.lorainit.conftest import make_tokenizer


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_loss_is_the_models_own_over_the_trained_tokens(bases, rows, base):
    model = load_model(bases[base], dtype=torch.float32, device=torch.device("cpu"))
    batch = collate(load(rows, make_tokenizer(), max_length=256).samples[:5], pad=0)
    found = tally(model, batch)
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
        tally(model, replace(batch, predicting=batch.predicting + batch.ids.numel()))
    assert torch.equal(logits_of(model, batch), before)


def test_padding_does_not_change_the_loss(bases, rows):
    model = load_model(bases["llama"], dtype=torch.float32, device=torch.device("cpu"))
    samples = load(rows, make_tokenizer(), max_length=256).samples[:6]
    together = tally(model, collate(samples, pad=0))
    alone = [tally(model, collate([sample], pad=0)) for sample in samples]
    assert float(together.loss) == pytest.approx(sum(float(t.loss) for t in alone), rel=1e-5)
    assert together.tokens == sum(t.tokens for t in alone)
