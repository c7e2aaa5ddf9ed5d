"""Bases of which some layers cannot be in four bits: which these are, and how the card loads the very same base."""

import json

import pytest
import torch

from lorainit.config.events import Message
from lorainit.export import model_card
from lorainit.model.layers import quantize
from lorainit.model.load import build_skeleton
from lorainit.model.targets.four_bits import choose_four_bits
from lorainit.model.targets.targets import find_linear_layers
from tests.lorainit.test_quantized import base_of, bits, go, nf4, slow

__all__ = ["base_of"]  # a fixture
pytestmark = pytest.mark.usefixtures("training_only")


def loaded_as_the_card_says(folder, tmp_path):
    """Run the card's own lines, but for the adapter."""
    held = choose_four_bits(build_skeleton(folder))
    loading = quantize.nf4_config(held.skip)
    card = {"root": str(folder), "method": "kaiming", "paper": "", "rank": 4, "alpha": 4.0, "loading": loading}
    model_card.write(tmp_path, **card, unpackable=held.unpackable)
    blocks = (tmp_path / "README.md").read_text().split("```python")[1:]
    names = {}
    for block in blocks:
        exec(block.split("```")[0].split("model = PeftModel")[0], names)
    return names["base"]


@pytest.mark.parametrize("kind", [slow("gemma3n"), "mamba2"])
def test_a_base_that_cannot_be_repacked_for_a_cpu_runs_as_the_card_says(kind, base_of, tmp_path):
    base = loaded_as_the_card_says(base_of(kind), tmp_path).eval()
    ids = torch.arange(8)[None] + 5
    with torch.no_grad():
        assert base(input_ids=ids).logits.isfinite().all()
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = True  # as bitsandbytes has it on such a CPU
        with pytest.raises(AssertionError, match="divisible by block_n"):
            base(input_ids=ids)


def test_the_card_of_a_base_that_can_be_repacked_does_not_speak_of_it(bases):
    assert not choose_four_bits(build_skeleton(bases["wide-llama"])).unpackable


@pytest.mark.parametrize("kind", [slow("gemma3n"), "gemma3-vision", "mamba", slow("zamba2"), "qwen2_moe"])
def test_the_card_says_how_to_load_the_very_base(kind, base_of, tmp_path):
    """Bit for bit; Gemma 3n, Gemma 3 with its tower and Mamba have layers that cannot be in four bits."""
    folder = base_of(kind)
    model, stock = nf4(folder), loaded_as_the_card_says(folder, tmp_path)
    assert bits(model) == bits(stock)
    assert any(quantize.is_quantized(module) for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "kept", "quantized"),
    [
        ("gemma3-vision", "vision_tower", "language_model"),
        ("mamba", "out_proj", "in_proj"),
        slow("gemma3n", "correction_coefs", "modality_router"),
    ],
)
def test_only_what_gets_no_lora_and_cannot_be_in_four_bits_is_left(base_of, kind, kept, quantized):
    model = nf4(base_of(kind))
    layers = {name: quantize.is_quantized(module) for name, module in find_linear_layers(model).items()}
    assert not any(held for name, held in layers.items() if kept in name)
    assert all(held for name, held in layers.items() if quantized in name)


def test_where_nothing_has_to_be_left_the_base_is_loaded_as_usual(base_of):
    """Routers and gates get no LoRA, and are quantized, as everybody's are."""
    held = choose_four_bits(build_skeleton(base_of("qwen2_moe")))
    assert (held.skip, held.kept) == (None, [])


def test_a_run_says_which_layers_are_not_in_four_bits(spec, base_of, tmp_path):
    lora, source = {"init": "kaiming", "quantization": "nf4"}, {"source": str(base_of("gemma3-vision"))}
    events = go(spec(model=source, lora=lora, training={"max_steps": 1}), tmp_path / "out")
    (told,) = [e for e in events if isinstance(e, Message) and e.message.startswith("Not in four bits")]
    assert "vision" in told.message
    manifest = json.loads((tmp_path / "out/adapter/manifest.json").read_text())
    said = manifest["base"]["quantization"]["bitsandbytes"]
    assert "model.vision_tower" in said["llm_int8_skip_modules"]
    assert "model.vision_tower" in (tmp_path / "out/adapter/README.md").read_text()
