"""Downloads with adapters on experts: who reads them, who refuses them, and who leaves something out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.readers import arithmetic
from tests.readers.conftest import IDS, Download, ask, peft_logits

# The first test trains the downloads and may have to make an environment.
pytestmark = pytest.mark.timeout(1200)
EXACT = 2e-4  # of logits of size 10 or so, in float32, merged against unmerged
Get = Callable[[str], Download]


def test_newest_peft_makes_of_experts_what_the_numbers_say(download: Get, tmp_path: Path) -> None:
    kinds = {kind: download(kind) for kind in ("mixtral", "gpt_oss")}
    found = peft_logits(None, kinds, tmp_path / "found.safetensors")
    for kind, one in kinds.items():
        assert float((one.expected - one.untouched).abs().max()) > 0.5
        assert float((found[kind] - one.expected).abs().max()) < EXACT


def test_card_says_who_leaves_experts_out(download: Get) -> None:
    """What the readers below do is theirs; ours is to say so."""
    card = " ".join((download("mixtral").folder / "README.md").read_text().split())
    assert "with transformers 4 the experts are left out with only a warning" in card
    assert "vLLM leaves them out without an error where it has other names for a layer (Mixtral, for one)" in card


@pytest.mark.slow
def test_oldest_promised_peft_refuses_experts(download: Get, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="unexpected keyword argument 'target_parameters'"):
        peft_logits("oldest", {"mixtral": download("mixtral")}, tmp_path / "found.safetensors")


@pytest.mark.slow
def test_transformers_4_leaves_experts_out_and_peft_no_more_than_warns(download: Get, tmp_path: Path) -> None:
    """Nothing in a file can stop it: hence what the card says."""
    one, out = download("mixtral"), tmp_path / "found.safetensors"
    asked = {"cases": {"mixtral": [str(one.base), str(one.folder)]}, "ids": IDS, "out": str(out)}
    said = json.loads(ask("transformers-4", "read_peft.py", asked))
    assert any("target_parameters" in text and "no parameter was matched" in text for text in said)
    assert float((load_file(out)["mixtral"] - one.expected).abs().max()) > 0.5


# --- vLLM: its loader and what sorts experts for its kernels, from the CPU wheel; no kernel runs -------------------

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "experts"]
# What vLLM 0.32 calls a mixture's model and the part of a layer that holds the experts.
IN_VLLM = {
    "mixtral": (("mixtral", "MixtralForCausalLM"), "block_sparse_moe"),
    "qwen3_moe": (("qwen3_moe", "Qwen3MoeForCausalLM"), "mlp"),
    "gpt_oss": (("gpt_oss", "GptOssForCausalLM"), "mlp"),
}


def in_vllm(kind: str, one: Download, out: Path, *, mixed: bool) -> dict[str, torch.Tensor]:
    model, place = IN_VLLM[kind]
    asked = {"adapter": str(one.folder), "model": model, "place": place, "mixed": mixed, "modules": MODULES}
    ask("vllm", "read_vllm_experts.py", {**asked, "out": str(out)})
    return load_file(out)


def wanted(one: Download, name: str) -> torch.Tensor:
    """scale·B·A of all experts of the first layer's `name`, experts×out×in."""
    config = json.loads((one.folder / "adapter_config.json").read_text())
    tensors = load_file(one.folder / "adapter_model.safetensors")
    found = torch.stack(arithmetic.products(f"model.layers.0.mlp.{name}", 4, tensors))
    return (config["lora_alpha"] / config["r"] * found).float()


@pytest.mark.slow
def test_vllm_takes_experts_for_what_they_are_where_its_names_are_ours(download: Get, tmp_path: Path) -> None:
    one = download("gpt_oss")
    found = in_vllm("gpt_oss", one, tmp_path / "found.safetensors", mixed=False)
    for number, name in enumerate(("experts.base_layer", "experts")):
        torch.testing.assert_close(found[f"B{number}"] @ found[f"A{number}"], wanted(one, name), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_vllm_takes_experts_apart_where_it_is_told_that_the_file_holds_them_together(
    download: Get, tmp_path: Path
) -> None:
    one = download("qwen3_moe")
    found = in_vllm("qwen3_moe", one, tmp_path / "found.safetensors", mixed=True)
    gate, down, up = (found[f"B{n}"] @ found[f"A{n}"] for n in range(3))
    torch.testing.assert_close(torch.cat([gate, up], dim=1), wanted(one, "experts.base_layer"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(down, wanted(one, "experts"), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_vllm_refuses_experts_where_it_is_not_told(download: Get, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="enable_mixed_moe_lora_format"):
        in_vllm("qwen3_moe", download("qwen3_moe"), tmp_path / "found.safetensors", mixed=False)


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True])
def test_vllm_finds_no_experts_in_mixtral(download: Get, tmp_path: Path, mixed: bool) -> None:
    """The layer that is `mlp` in transformers 5 is `block_sparse_moe` there, and what fits no layer is passed over."""
    one = download("mixtral")
    assert in_vllm("mixtral", one, tmp_path / "found.safetensors", mixed=mixed) == {}
