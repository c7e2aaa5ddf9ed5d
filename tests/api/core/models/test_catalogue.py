"""The catalogue: what a request is checked against without opening a model."""

import os
from pathlib import Path

import pytest

from api.core.errors import BadReference, InvalidValue
from api.core.models import catalogue, catalogue_file
from api.core.models.catalogue_file import BadCatalogue
from api.core.settings import get_settings
from lorainit.config import target_modules
from lorainit.config.errors import UnsupportedModel
from lorainit.config.model_facts import Target
from lorainit.config.spec import Lora
from lorainit.model.source.find import find
from tests.conftest import forget


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
    assert catalogue.resolve_targets(Lora(r=4), ENTRY).target_modules == ["q", "k", "up"]
    assert catalogue.resolve_targets(Lora(r=4, target_modules="mlp"), ENTRY).target_modules == ["up"]


def test_the_size_counts_every_shape_of_a_name() -> None:
    resolved = catalogue.resolve_targets(Lora(r=4, target_modules=["q"]), ENTRY)
    modules, parameters = catalogue.count_parameters(resolved, ENTRY)
    assert (modules, parameters) == (4, 4 * (64 + 48) * 2)


def with_experts() -> catalogue.Entry:
    experts = target("experts.down_proj", 64, 48, "mlp", count=8).model_copy(update={"experts": True})
    return ENTRY.model_copy(update={"targets": [*ENTRY.targets, experts]})


def test_layers_are_counted_once_for_all_jobs_with_the_same_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    entry, unfolded = catalogue.require("smollm2-135m-instruct"), list[str]()
    unfold = target_modules.expand_names
    monkeypatch.setattr(target_modules, "expand_names", lambda path: unfolded.append(path) or unfold(path))
    target_modules._count_found.cache_clear()
    orders = [(["q_proj", "v_proj"], 4), (["q_proj", "v_proj"], 8)]
    (modules, parameters), again = (
        catalogue.count_parameters(Lora(target_modules=names, r=r), entry) for names, r in orders
    )
    assert unfolded == [path for target in entry.targets if target.name not in orders[0][0] for path in target.paths]
    assert (modules, again) == (60, (60, 2 * parameters))


def test_experts_are_counted_one_by_one() -> None:
    resolved = catalogue.resolve_targets(Lora(r=4, target_modules=["experts.down_proj"]), with_experts())
    assert catalogue.count_parameters(resolved, with_experts()) == (8, 8 * 4 * (64 + 48))


def test_dora_leaves_experts_out_of_a_group_of_layers_and_is_refused_where_they_are_named() -> None:
    resolved = catalogue.resolve_targets(Lora(r=4, use_dora=True, target_modules="mlp"), with_experts())
    assert resolved.target_modules == ["up"]
    with pytest.raises(InvalidValue, match="no DoRA for experts") as caught:
        catalogue.resolve_targets(Lora(r=4, use_dora=True, target_modules=["up", "experts.down_proj"]), with_experts())
    assert (caught.value.code, caught.value.param) == ("unsupported_combination", "lora.use_dora")


def test_experts_do_not_decide_whether_a_base_can_be_quantized() -> None:
    wide = with_experts().model_copy(update={"targets": [target("q", 8, 64), with_experts().targets[-1]]})
    assert wide.quantization == ["nf4"]


@pytest.mark.parametrize(("r", "names", "side"), [(9, ["k"], 8), (17, ["q"], 16), (33, ["up"], None)])
def test_a_rank_above_any_shape_of_a_target_is_refused(r: int, names: list[str], side: int | None) -> None:
    with pytest.raises(InvalidValue, match=str(side) if side else "between 1 and 32") as caught:
        catalogue.resolve_targets(Lora(r=r, target_modules=names), ENTRY)
    assert (caught.value.code, caught.value.param) == ("rank_too_large", "lora.r")


def test_nf4_is_offered_where_rows_are_whole_blocks_and_refused_elsewhere() -> None:
    wide = ENTRY.model_copy(update={"targets": [target("q", 8, 64), target("up", 8, 128, "mlp")]})
    assert (ENTRY.quantization, wide.quantization) == ([], ["nf4"])
    order = Lora(r=4, target_modules=["q"], quantization="nf4")
    assert catalogue.resolve_targets(order, wide).quantization == "nf4"
    with pytest.raises(InvalidValue, match="multiple of the block size, 64") as caught:
        catalogue.resolve_targets(order, ENTRY)
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
        catalogue.resolve_targets(lora, ENTRY)
        return
    with pytest.raises(InvalidValue, match="directions, more than the smaller side") as caught:
        catalogue.resolve_targets(lora, ENTRY)
    assert (caught.value.code, caught.value.param) == ("rank_too_large", "lora.init")


def test_a_run_is_told_what_the_weights_were_when_the_base_was_inspected() -> None:
    assert ENTRY.model_copy(update={"base_sha256": "f" * 64}).reference().sha256 == "f" * 64


def test_an_unknown_target_is_named_with_its_place() -> None:
    with pytest.raises(InvalidValue, match="'lm_head'") as caught:
        catalogue.resolve_targets(Lora(r=4, target_modules=["q", "lm_head"]), ENTRY)
    assert caught.value.param == "lora.target_modules[1]"


@pytest.mark.parametrize("source", ["", " ", "~no_such_user/x"])
def test_a_source_that_is_no_path_is_refused_wherever_a_base_is_looked_for(source: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"empty|no home folder '~no_such_user'"):
        find(source)


def test_a_hub_name_is_an_alias_and_an_unknown_one_is_refused() -> None:
    assert catalogue.require("HuggingFaceTB/SmolLM2-135M-Instruct").id == "smollm2-135m-instruct"
    with pytest.raises(BadReference, match="smollm2-135m-instruct"):
        catalogue.require("nothing")


GOOD = """
[[models]]
id = "tiny"
root = "lab/tiny"
source = "models/tiny"
max_length = 64
chat = true
targets = [
  { name = "q", group = "attention", out_features = 32, in_features = 32, count = 2 },
  { name = "up", group = "mlp", out_features = 64, in_features = 32, count = 2 },
]
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[models]\n", "is not TOML: .*line 1"),
        (
            "\n\n[[models]]\nid = 'x'\n",
            r"line 3: models\[0\]\.root \(model 'x'\): field required \(4 more after this\)",
        ),
        ("# nothing\n", "line 1: models: field required"),
        ("\nmodels = [{ id = 'x y' }]", r"line 2: models\[0\]\.root \(model 'x y'\): field required \(5 more"),
        (GOOD.replace("lab/tiny", "tiny"), r"line 4: models\[0\]\.root .*: 'tiny' is no hub id .* write local:tiny"),
        (GOOD.replace("models/tiny", "hub:tiny"), r"line 5: models\[0\]\.source .*: 'hub:tiny' is not hub:OWNER"),
        (GOOD.replace('"mlp"', '"mpl"'), r"line 10: models\[0\]\.targets\[1\]\.group"),
        (
            GOOD + GOOD.replace("max_length = 64", "max_lenght = 64"),
            r"line 17: .*max_length .*and 'max_lenght' is no field",
        ),
        (GOOD.replace("[models]", "[model]"), "line 2: models: field required, and 'model' is no field"),
        (GOOD + GOOD.replace("true", "1"), r"line 18: models\[1\]\.chat"),
        (GOOD + GOOD, r"line 14: models\[1\]\.id \(model 'tiny'\): 'tiny' is there twice"),
        ("\x00", "is not TOML"),
        ("x = " + "[" * 100_000, "cannot be read as TOML"),
        ("x = " + "9" * 10_000, "cannot be read as TOML"),
        ("#" * (16 << 20) + "\n", "more than the 16777216 bytes"),
        (
            GOOD.replace("models/tiny", "~no_such_user/x"),
            r"line 5: .*source \(model 'tiny'\): .* home folder '~no_such_user'",
        ),
        (GOOD.replace("models/tiny", "a\\u0000b"), r"line 5: .*source .*: there is a control character in it, '\\x00'"),
        (GOOD.replace('"up"', '"up\\n"'), r"line 10: .*targets\[1\]\.name .*: there is a control character"),
        (GOOD.replace("models/tiny", "  "), r"line 5: .*source .* is empty"),
        (GOOD.replace("models/tiny", "x" * 5000), r"line 5: .*source .*at most 4096 characters"),
        (GOOD.replace("64, in", f"1{'0' * 400}, in"), r"line 10: .*out_features .*less than or equal to 1000000000"),
        (GOOD + "base_learning_rate = 1e300", r"line 12: .*base_learning_rate .*less than or equal to 1"),
        (GOOD + "base_sha256 = 'zz'", r"line 12: .*base_sha256 .*pattern"),
        (GOOD.partition("targets")[0] + "targets = []", r"line 8: .*targets .*at least 1 item"),
    ],
)
def test_a_broken_catalogue_is_told_with_file_line_and_field(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(text)
    with pytest.raises(BadCatalogue, match=rf"^The catalogue {path}.*{words}"):
        catalogue.load(path)


def test_a_catalogue_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    for name, words in (("none.toml", "No such file"), ("", "Is a directory"), ("latin.toml", "not UTF-8")):
        with pytest.raises(BadCatalogue, match=words):
            catalogue.load(tmp_path / name)


def test_a_catalogue_that_is_a_pipe_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "models.toml")
    with pytest.raises(BadCatalogue, match="not a plain file"):
        catalogue.load(tmp_path / "models.toml")


def test_a_fault_that_nobody_has_thought_of_is_a_bad_catalogue_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*_: object, **__: object) -> str:
        raise RuntimeError("what is that?")

    monkeypatch.setattr(catalogue.sources, "make_absolute", stumble)
    file.write_text(GOOD + "\n")
    assert list(catalogue.get_entries()) == ["tiny"]
    assert f"The catalogue {file} cannot be used: RuntimeError: what is that?" in catalogue.get_refusal()


def test_a_relative_source_is_beside_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models.toml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    assert catalogue.load(Path("models.toml"))["tiny"].source == str(tmp_path / "models" / "tiny")
    (tmp_path / "models.toml").write_text(GOOD.replace("models/tiny", "hub:lab/tiny@v1"))
    assert catalogue.load(Path("models.toml"))["tiny"].source == "hub:lab/tiny@v1"


def base_in(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").touch()


@pytest.fixture
def file(environment: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A good catalogue, in effect."""
    path = tmp_path / "models.toml"
    path.write_text(GOOD)
    environment.setenv("LORAINIT_CATALOGUE", str(path))
    forget()
    assert list(catalogue.get_entries()) == ["tiny"]
    return path


def test_a_changed_catalogue_is_picked_up(file: Path) -> None:
    file.write_text(GOOD + GOOD.replace('"tiny"', '"other"'))
    assert list(catalogue.get_entries()) == ["tiny", "other"]


@pytest.mark.parametrize("broken", ["nonsense", "", None])
def test_a_changed_catalogue_that_is_broken_is_refused_until_it_is_mended(broken: str | None, file: Path) -> None:
    file.unlink()
    if broken is not None:
        file.write_text(broken)
    assert (list(catalogue.get_entries()), str(file) in catalogue.get_refusal()) == (["tiny"], True)
    file.write_text(GOOD.replace('"tiny"', '"mended"'))
    assert (list(catalogue.get_entries()), catalogue.get_refusal()) == (["mended"], "")


@pytest.mark.parametrize("start", ["serve", "separate"])
def test_changed_catalogue_is_taken_only_if_the_service_would_start_with_it(
    start: str, file: Path, environment: pytest.MonkeyPatch
) -> None:
    """`lorainit serve` needs every base model here; an API of its own has none of them."""
    base_in(file.parent / "models" / "tiny")
    if start == "serve":
        environment.setenv("LORAINIT_BASE_MODELS_HERE", "true")
        get_settings.cache_clear()
    file.write_text(GOOD + GOOD.replace("tiny", "other"))
    missing = f"model 'other': its source, {file.parent / 'models/other'}, is neither"
    assert (list(catalogue.get_entries()), missing in catalogue.get_refusal()) == {
        "serve": (["tiny"], True),
        "separate": (["tiny", "other"], False),
    }[start]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("package:no_such_package/x.gguf", "'no_such_package' is not installed"),
        ("package:__main__/x.gguf", "'__main__' is not installed"),
        ("package:api/no.gguf", "is neither a folder nor a .gguf file"),
        (".", "is a folder without a config.json"),
        ("models.toml", "is neither a folder nor a .gguf file"),
        ("x" * 300, "File name too long"),
        ("loop", "is neither a folder nor a .gguf file"),
    ],
)
def test_a_source_that_is_no_base_is_told_with_its_model(source: str, words: str, file: Path) -> None:
    (file.parent / "loop").symlink_to("loop")
    file.write_text(GOOD.replace("models/tiny", source))
    (found,) = catalogue.find_missing_sources()
    assert found.startswith("model 'tiny': ")
    assert words in found


def test_files_that_are_not_here_are_named(file: Path) -> None:
    assert catalogue.find_missing_sources() == [
        f"model 'tiny': its source, {file.parent / 'models/tiny'}, is neither a folder nor a .gguf file."
    ]
    base_in(file.parent / "models" / "tiny")
    assert catalogue.find_missing_sources() == []
    file.write_text(GOOD.replace("models/tiny", "hub:lab/tiny"))
    assert catalogue.find_missing_sources() == []


@pytest.mark.slow  # it loads torch and a real model
def test_the_entry_that_comes_with_the_service_is_what_inspecting_its_base_says(tmp_path: Path) -> None:
    from lorainit.model.inspect import inspect

    entry = catalogue.load(None)["smollm2-135m-instruct"]
    found = inspect(entry.source, cache=tmp_path)
    assert entry.targets == found.targets
    assert (entry.max_length, entry.chat) == (found.max_length, found.chat)


def test_a_catalogue_that_begins_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "catalogue.toml"
    file.write_text("models = []\n", encoding="utf-8-sig")
    assert catalogue_file.read(file).tables == {"models": []}


def test_a_catalogue_without_a_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "catalogue.toml"
    file.write_text("models = []\n")
    with pytest.raises(BadCatalogue, match="line 1: models: list should have at least 1 item"):
        catalogue.load(file)
