"""Downloads in stock PEFT: the newest and the oldest that README promises, beside others and in their place."""

import json
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from transformers import AutoModelForCausalLM

from tests.readers import arithmetic
from tests.readers.conftest import CASES, IDS, PLAIN, SLOW, USUAL, Download, peft_logits, same_tier, slowly

# The first test trains the downloads and may have to make an environment.
pytestmark = pytest.mark.timeout(1200)
EXACT = 2e-4  # of logits of size 10 or so, in float32, merged against unmerged
Get = Callable[[str], Download]


# PEFT before 0.12 has no DoRA on a `Conv1D` that is not square.
READERS = {
    None: list(CASES),
    "oldest": [name for name in CASES if name != "kaiming-dora-gpt2"],
    "peft-0.12": list(CASES),
}


@pytest.fixture(scope="module")
def by_peft(download: Get, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None, str], torch.Tensor]:
    """What a PEFT makes of a case; those of a tier are read together when the first is asked for."""
    folder = tmp_path_factory.mktemp("logits")

    @cache
    def read(reader: str | None, *names: str) -> dict[str, torch.Tensor]:
        out = folder / f"{reader}-{names[0]}.safetensors"
        return peft_logits(reader, {name: download(name) for name in names}, out)

    return lambda reader, name: read(reader, *same_tier(name, READERS[reader]))[name]


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        pytest.param(reader, name, marks=[pytest.mark.slow] if reader == "peft-0.12" or name in SLOW else [])
        for reader, names in READERS.items()
        for name in names
    ],
)
def test_download_does_what_its_numbers_say(
    reader: str | None, name: str, by_peft: Callable[[str | None, str], torch.Tensor], download: Get
) -> None:
    one = download(name)
    assert float((one.expected - one.untouched).abs().max()) > 0.5  # the adapter does something
    assert float((by_peft(reader, name) - one.expected).abs().max()) < EXACT


def on_base(one: Download, adapter: str) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(one.base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, one.folder, adapter_name=adapter).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize("name", slowly(name for name in PLAIN if name != "kaiming"))
def test_weighted_sum_with_another_download_is_the_sum_of_both(name: str, download: Get) -> None:
    one, other = download(name), download("kaiming")
    model = on_base(one, "one")
    model.load_adapter(str(other.folder), adapter_name="other")
    model.add_weighted_adapter(["one", "other"], [0.7, 0.3], "sum", combination_type="cat")
    model.set_adapter("sum")
    wanted = arithmetic.logits(one.base, IDS, (one.folder, 0.7), (other.folder, 0.3))
    assert float((logits(model) - wanted).abs().max()) < EXACT


@pytest.mark.parametrize("name", slowly(name for name in PLAIN if name != "kaiming"))
def test_download_is_swapped_in_for_another_one(name: str, download: Get) -> None:
    one, other = download(name), download("kaiming")
    model = on_base(other, "default")
    before = logits(model)
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    hotswap_adapter(model, str(one.folder), adapter_name="default", torch_device="cpu")
    assert float((before - other.expected).abs().max()) < EXACT
    assert float((logits(model) - one.expected).abs().max()) < EXACT


def test_alpha_pattern_is_what_hot_swap_refuses(download: Get) -> None:
    """Why mixed ranks are padded by default."""
    model = on_base(download("kaiming"), "default")
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    with pytest.raises(ValueError, match="alpha_pattern"):
        hotswap_adapter(model, str(download("eva-pattern").folder), adapter_name="default", torch_device="cpu")


def test_padded_and_patterned_ranks_are_the_same_adapter(download: Get) -> None:
    padded, patterned = download("eva"), download("eva-pattern")
    assert float((padded.expected - patterned.expected).abs().max()) < 1e-6
    assert (padded.folder / "adapter_model.safetensors").stat().st_size > (
        patterned.folder / "adapter_model.safetensors"
    ).stat().st_size


def test_config_has_no_key_that_the_oldest_peft_does_not_know(download: Get) -> None:
    keys = set.union(*(set(json.loads((download(n).folder / "adapter_config.json").read_text())) for n in USUAL))
    assert keys == {
        "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "lora_dropout",
        "target_modules", "fan_in_fan_out", "bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    }  # fmt: skip


def test_manifest_keeps_the_scale_as_it_was_trained(download: Get) -> None:
    folder: Path = download("lora_one-r6").folder
    lora = json.loads((folder / "manifest.json").read_text())["lora"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (lora["alpha"], lora["use_rslora"]) == (16.0, True)
    assert config["use_rslora"] is False
    assert config["lora_alpha"] / config["r"] == pytest.approx(lora["scaling"], rel=1e-12)
    assert config["lora_alpha"] != int(config["lora_alpha"])
