"""Layers that are computed again in the backward pass keep less and give the same bits."""

import pytest
import torch

from lorainit.model.forward.recompute import recompute
from lorainit.run import run
from tests.lorainit.conftest import tiny_llama
from tests.lorainit.shortage import CHECKPOINTING, adapter

pytestmark = pytest.mark.usefixtures("training_only")


@pytest.mark.parametrize("name", ["wide-llama", "wide-gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_computed_again_give_the_same_bits(spec, tmp_path, name, dropout):
    ends = []
    for switch in (False, True):
        one = spec(name, lora={"init": "kaiming", "dropout": dropout}, training={CHECKPOINTING: switch})
        ends.append(adapter(run(one, tmp_path / str(switch), lambda event: None)))
    assert all(torch.equal(ends[0][tensor], ends[1][tensor]) for tensor in ends[0])


def test_layers_computed_again_keep_less():
    model = tiny_llama(64, 128).requires_grad_(False)

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(inputs_embeds=embedded, use_cache=False)
        return sum(sizes)

    embedded = torch.randn(2, 32, model.config.hidden_size, requires_grad=True)
    before = kept()
    assert recompute(model)
    assert recompute(model), "switching it on again changes nothing"
    assert kept() < before / 3
