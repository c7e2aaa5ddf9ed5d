"""The zoo's bases are what they claim to be, for stock transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.zoo.bases import KINDS, make

TRAIN = [name for name, kind in KINDS.items() if kind.expected == "trains" and not kind.missing]
# What the product's promise names; an architecture that this transformers lacks stays in the table with a reason.
PROMISED = {
    "llama3", "qwen2", "qwen3", "gemma2", "gemma3", "gemma4", "phi3-longrope", "granite", "olmo2", "cohere2", "gpt2",
    "gpt_neox", "opt", "falcon", "bloom", "mpt", "mixtral", "qwen3_moe", "qwen3_next", "gpt_oss", "deepseek_v3",
    "glm4_moe", "llama4", "mamba2", "jamba", "lfm2", "bamba", "falcon_h1", "bert", "bart", "t5", "qwen2_vl",
    "missing-mlp",
}  # fmt: skip


def test_every_promised_kind_is_there():
    assert set(KINDS) >= PROMISED


@pytest.mark.parametrize("kind", TRAIN)
def test_a_base_that_should_train_is_complete_causal_and_not_flat(kind: str, tmp_path: Path):
    folder = make(kind, tmp_path / kind)
    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(told.values())
    ids = torch.randint(5, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    other = torch.cat([ids[:, :30], ids[:, 30:] + 1], dim=1)
    with torch.no_grad():
        before, after = (model.eval()(input_ids=x, use_cache=False).logits for x in (ids, other))
    assert float(before.std()) > 0.3
    assert float((before[:, :30] - after[:, :30]).abs().max()) < 1e-5
    assert not torch.allclose(before[:, 30:], after[:, 30:])
