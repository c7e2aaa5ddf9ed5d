"""The catalogue: what a request is checked against without opening a model."""

from pathlib import Path

import pytest

from api.core import catalogue
from api.core.errors import BadReference, InvalidValue
from lorainit.facts import Target
from lorainit.spec import Lora


def target(name: str, out: int, n: int, group: str = "attention", count: int = 2) -> Target:
    return Target.model_validate({"name": name, "group": group, "out_features": out, "in_features": n, "count": count})


ENTRY = catalogue.Entry(
    id="tiny",
    root="lab/tiny",
    source="/models/tiny",
    max_length=64,
    max_r=32,
    chat=True,
    targets=[target("q", 32, 32), target("k", 8, 32), target("q", 16, 32), target("up", 64, 32, "mlp")],
)


def test_groups_become_names() -> None:
    assert catalogue.place(Lora(r=4), ENTRY).target_modules == ["q", "k", "up"]
    assert catalogue.place(Lora(r=4, target_modules="mlp"), ENTRY).target_modules == ["up"]


def test_the_size_counts_every_shape_of_a_name() -> None:
    modules, parameters = catalogue.size(catalogue.place(Lora(r=4, target_modules=["q"]), ENTRY), ENTRY)
    assert (modules, parameters) == (4, 4 * (64 + 48) * 2)


def with_experts() -> catalogue.Entry:
    experts = target("experts.down_proj", 64, 48, "mlp", count=8).model_copy(update={"experts": True})
    return ENTRY.model_copy(update={"targets": [*ENTRY.targets, experts]})


def test_experts_are_counted_one_by_one() -> None:
    placed = catalogue.place(Lora(r=4, target_modules=["experts.down_proj"]), with_experts())
    assert catalogue.size(placed, with_experts()) == (8, 8 * 4 * (64 + 48))


def test_dora_leaves_experts_out_of_a_group_of_layers_and_is_refused_where_they_are_named() -> None:
    assert catalogue.place(Lora(r=4, use_dora=True, target_modules="mlp"), with_experts()).target_modules == ["up"]
    with pytest.raises(InvalidValue, match="no DoRA for experts") as caught:
        catalogue.place(Lora(r=4, use_dora=True, target_modules=["up", "experts.down_proj"]), with_experts())
    assert (caught.value.code, caught.value.param) == ("unsupported_combination", "lora.use_dora")


def test_experts_do_not_decide_whether_a_base_can_be_quantized() -> None:
    wide = with_experts().model_copy(update={"targets": [target("q", 8, 64), with_experts().targets[-1]]})
    assert wide.quantization == ["nf4"]


@pytest.mark.parametrize(("r", "names", "side"), [(9, ["k"], 8), (17, ["q"], 16), (33, ["up"], None)])
def test_a_rank_above_any_shape_of_a_target_is_refused(r: int, names: list[str], side: int | None) -> None:
    with pytest.raises(InvalidValue, match=str(side) if side else "between 1 and 32") as caught:
        catalogue.place(Lora(r=r, target_modules=names), ENTRY)
    assert (caught.value.code, caught.value.param) == ("rank_too_large", "lora.r")


def test_nf4_is_offered_where_rows_are_whole_blocks_and_refused_elsewhere() -> None:
    wide = ENTRY.model_copy(update={"targets": [target("q", 8, 64), target("up", 8, 128, "mlp")]})
    assert (ENTRY.quantization, wide.quantization) == ([], ["nf4"])
    order = Lora(r=4, target_modules=["q"], quantization="nf4")
    assert catalogue.place(order, wide).quantization == "nf4"
    with pytest.raises(InvalidValue, match="multiple of the block size, 64") as caught:
        catalogue.place(order, ENTRY)
    assert (caught.value.code, caught.value.param) == ("unsupported_combination", "lora.quantization")


@pytest.mark.parametrize(
    ("init", "names", "fits"),
    [
        ({"method": "lora_ga"}, ["k"], False),
        ({"method": "lora_ga"}, ["q"], True),
        ({"method": "hrp", "preheat_rank": 17}, ["q"], False),
        ({"method": "hrp", "preheat_rank": 16}, ["q"], True),
        ({"method": "hrp"}, ["k"], True),
    ],
)
def test_an_init_that_needs_more_directions_than_a_target_has_is_refused(
    init: dict[str, object], names: list[str], fits: bool
) -> None:
    lora = Lora.model_validate({"init": init, "r": 6, "target_modules": names})
    if fits:
        catalogue.place(lora, ENTRY)
        return
    with pytest.raises(InvalidValue, match="directions, more than the smaller side") as caught:
        catalogue.place(lora, ENTRY)
    assert (caught.value.code, caught.value.param) == ("rank_too_large", "lora.init")


def test_an_unknown_target_is_named_with_its_place() -> None:
    with pytest.raises(InvalidValue, match="'lm_head'") as caught:
        catalogue.place(Lora(r=4, target_modules=["q", "lm_head"]), ENTRY)
    assert caught.value.param == "lora.target_modules[1]"


def test_a_hub_name_is_an_alias_and_an_unknown_one_is_refused() -> None:
    assert catalogue.require("HuggingFaceTB/SmolLM2-135M-Instruct").id == "smollm2-135m-instruct"
    with pytest.raises(BadReference, match="smollm2-135m-instruct"):
        catalogue.require("nothing")


def test_a_broken_catalogue_says_where(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text('[[models]]\nid = "x"\n')
    with pytest.raises(ValueError, match=r"models\.toml"):
        catalogue.load(path)
