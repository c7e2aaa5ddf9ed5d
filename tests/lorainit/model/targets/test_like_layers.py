"""Layers that are alike are tried once: which are, and that the verdict is that of a trial of all of them."""

import time
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from lorainit.config.errors import UnsupportedModel
from lorainit.model.targets import peft_support
from lorainit.model.targets.like_layers import find_counterpart, find_like_layers
from lorainit.model.targets.targets import find_linear_layers
from tests.zoo.kind import COMMON

pytestmark = pytest.mark.filterwarnings("ignore")
MAMBA = {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16, "chunk_size": 16}


def skeleton(name: str, **values: Any) -> Any:
    with torch.device("meta"):
        config = getattr(transformers, name)(**{**COMMON, **values})
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def layers_of(model: Any) -> dict[int, int]:
    return {int(a.split(".")[2]): int(b.split(".")[2]) for a, b in find_like_layers(model).items()}


def test_all_but_the_first_the_second_and_the_last_of_equal_layers_are_twins() -> None:
    assert layers_of(skeleton("LlamaConfig", num_hidden_layers=6)) == {2: 1, 3: 1, 4: 1}


def test_layers_of_other_shapes_attributes_or_kinds_are_no_twins() -> None:
    sparse = skeleton("Qwen3MoeConfig", num_hidden_layers=7, num_experts=4, mlp_only_layers=[3])
    assert layers_of(sparse) == {2: 1, 4: 1, 5: 1}
    kinds = ["full_attention", "sliding_attention"] * 4
    windows = skeleton(
        "Qwen2Config", num_hidden_layers=8, layer_types=kinds, sliding_window=16, use_sliding_window=True
    )
    assert layers_of(windows) == {3: 1, 4: 2, 5: 1, 6: 2}


def test_counterpart_is_the_same_part_of_the_like_layer() -> None:
    alike = {"model.layers.12": "model.layers.1"}
    assert find_counterpart("model.layers.12.mlp.up_proj", alike) == "model.layers.1.mlp.up_proj"
    assert find_counterpart("model.layers.1.mlp.up_proj", alike) == "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(("name", "values"), [("PhimoeConfig", {"num_local_experts": 4}), ("Mamba2Config", MAMBA)])
def test_one_layer_of_each_kind_says_what_all_of_them_say(
    name: str, values: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = skeleton(name, num_hidden_layers=5, **values)
    names = list(find_linear_layers(model))
    found = peft_support._try(model.config, names)
    assert (len(found), layers_of(model)) == (5, {2: 1, 3: 1})
    monkeypatch.setattr(peft_support, "find_like_layers", lambda _model: {})
    assert found == peft_support._try(model.config, names)


def test_trial_of_a_deep_model_costs_little_more_than_one_of_a_shallow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations are counted, since a busy machine changes times."""
    counted = [0]
    plain = peft_support._TimedFakeTensors.__torch_dispatch__

    def count(self: Any, *args: Any, **options: Any) -> Any:
        counted[-1] += 1
        return plain(self, *args, **options)

    monkeypatch.setattr(peft_support._TimedFakeTensors, "__torch_dispatch__", count)
    for layers in (4, 40):
        model = skeleton("LlamaConfig", num_hidden_layers=layers)
        peft_support._observe(model.config, [], time.thread_time() + peft_support.MAX_SECONDS)
        counted.append(0)
    shallow, deep, _ = counted
    assert 0 < deep < 2 * shallow  # weights are made for all layers


def test_trial_that_takes_too_long_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    model = skeleton("LlamaConfig")
    monkeypatch.setattr(peft_support, "MAX_SECONDS", 0.0)
    peft_support._refusals.cache_clear()
    with pytest.raises(UnsupportedModel, match="a few tokens take more than 0 s of a processor"):
        peft_support.find_refusals(model, list(find_linear_layers(model)))
