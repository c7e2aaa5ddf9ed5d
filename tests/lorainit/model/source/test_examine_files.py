"""Folders whose files are broken, or made to do harm, are refused before a library reads them."""

import json
import os
import struct
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from lorainit.config.errors import UnsupportedModel
from lorainit.data.chat.turns import Span
from lorainit.data.reader import Encoder
from lorainit.model.inspect import inspect
from lorainit.model.load import load_tokenizer, locate_base
from lorainit.model.source.examine import examine
from lorainit.runtime.refusal import as_unsupported
from tests.lorainit.conftest import make_tokenizer


def write_header(folder: Path, header: object, data: int) -> None:
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "text"),
    [
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12, "b does not begin where the tensor before it ends"),
        ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, 20, "b does not begin where"),
        ({"a": entry(0, 8, [2])}, 12, "describes 8 bytes of weights, and 12 are there"),
        ({"a": entry(0, 8, [3])}, 8, "the entry of a makes no sense"),
        ({"a": entry(0, 8, [2], "F33")}, 8, "the entry of a makes no sense"),
        ({"a": entry(0, 8, [-2])}, 8, "the entry of a makes no sense"),
        ({"a": entry(0, 8, [1 << 40] * 1000)}, 8, "the entry of a makes no sense"),
        ({"a": [1]}, 8, "the entry of a makes no sense"),
        ({"a": entry(0, 2, [2], "F8_E4M3")}, 2, "a is quantized"),
    ],
)
def test_header_that_does_not_describe_its_file_is_refused(llama: Path, header: object, data: int, text: str) -> None:
    write_header(llama, header, data)
    with pytest.raises(UnsupportedModel, match=text):
        examine(llama)


def test_pipe_in_a_folder_is_refused_and_not_waited_for(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    os.mkfifo(llama / "tokenizer.json")
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json is not a plain file"):
        examine(llama)


def test_link_to_itself_is_refused(llama: Path) -> None:
    (llama / "tokenizer_config.json").unlink()
    (llama / "tokenizer_config.json").symlink_to("tokenizer_config.json")
    with pytest.raises(UnsupportedModel, match=r"tokenizer_config\.json cannot be read"):
        examine(llama)


def test_source_that_is_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UnsupportedModel, match="no base model"):
        locate_base(str(tmp_path / "loop"), cache=tmp_path)


def test_file_too_large_to_read_is_refused_unread(llama: Path) -> None:
    with (llama / "tokenizer.json").open("r+b") as stream:
        stream.truncate(1 << 40)  # a hole: it takes no room
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json has 1099511627776 bytes"):
        examine(llama)


def test_adapter_is_no_base_although_it_names_one(llama: Path, bases: dict[str, Path]) -> None:
    (llama / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(bases["gpt2"])}))
    with pytest.raises(UnsupportedModel, match="is a PEFT adapter"):
        examine(llama)


@pytest.mark.parametrize("where", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_index_that_leaves_its_folder_is_refused(llama: Path, where: str) -> None:
    (llama / "model.safetensors").rename(llama / "x.safetensors")
    (llama / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": where}}))
    with pytest.raises(UnsupportedModel, match="not a file of this folder"):
        examine(llama)


def test_shard_without_what_the_index_promises_is_refused(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "x.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "x.safetensors", "model.lost.weight": "x.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel, match=r"x\.safetensors lacks model\.lost\.weight"):
        examine(llama)


@pytest.mark.parametrize("metadata", [None, [], "absent"])
def test_index_that_transformers_would_fall_over_is_refused(llama: Path, metadata: object) -> None:
    (llama / "model.safetensors").rename(llama / "x.safetensors")
    index = {"weight_map": {"lm_head.weight": "x.safetensors"}} | (
        {} if metadata == "absent" else {"metadata": metadata}
    )
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel, match='has no "metadata" object'):
        examine(llama)


def test_generation_config_that_is_no_object_is_refused(llama: Path) -> None:
    (llama / "generation_config.json").write_text("[1]")
    with pytest.raises(UnsupportedModel, match=r"generation_config\.json is not a JSON object"):
        examine(llama)


def test_link_to_nowhere_that_nothing_reads_is_no_obstacle(llama: Path) -> None:
    (llama / "notes.txt").symlink_to(llama / "nowhere")
    assert examine(llama).config.model_type == "llama"


@pytest.mark.parametrize(("name", "value"), [("return_dict", False), ("layerdrop", 0.5)])
def test_setting_under_which_no_run_could_work_is_named(llama: Path, name: str, value: object) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(UnsupportedModel, match=f"config.json says {name} = {str(value).lower()}"):
        examine(llama)


@pytest.mark.parametrize(("named", "context"), [(None, 2048), (77, 77)])
def test_context_that_no_config_names_is_what_transformers_takes(
    llama: Path, tmp_path: Path, named: int | None, context: int
) -> None:
    config = json.loads((llama / "config.json").read_text())
    del config["max_position_embeddings"]
    (llama / "config.json").write_text(json.dumps(config | ({"max_position_embeddings": named} if named else {})))
    assert inspect(str(llama), cache=tmp_path).max_length == context


@pytest.mark.parametrize("change", [{"rms_norm_eps": "NaN"}, {"num_key_value_heads": -1}, {"hidden_act": "none"}])
def test_nonsense_in_a_config_is_a_refusal(llama: Path, change: dict[str, object]) -> None:
    config = json.loads((llama / "config.json").read_text()) | change
    (llama / "config.json").write_text(json.dumps(config).replace('"NaN"', "NaN"))
    with pytest.raises(UnsupportedModel, match=r"config\.json|cannot be"):
        examine(llama)


def test_facts_that_no_catalogue_takes_are_a_refusal(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"max_position_embeddings": 1}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="No catalogue can offer the base model: max_length"):
        inspect(str(llama), cache=tmp_path)


# --- libraries that trust their files --------------------------------------------------------------


PANICS: dict[str, dict[str, object]] = {
    "no-table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "high-id": {"model": {"type": "BPE", "vocab": {"a": 4294967295, "b": 0}, "merges": [["a", "b"]]}},
    "long-prefix": {
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "ab": 2},
            "merges": [["a", "b"]],
            "continuing_subword_prefix": "##x",
        }
    },
    "short-table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "CAAAAAEAAAACAAAA"}},
    "no-length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
}


@pytest.mark.parametrize("name", PANICS)
def test_panic_of_the_tokenizers_rust_code_is_a_refusal(name: str, llama: Path) -> None:
    path = llama / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | PANICS[name]))
    with pytest.raises(UnsupportedModel, match=r"tokenizer cannot (be loaded|read a text): \w"):
        load_tokenizer(llama)


def test_panic_at_a_row_of_the_data_is_a_refusal() -> None:
    tokenizer = make_tokenizer()
    encode = Encoder(tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.FixedLength(0)
    with pytest.raises(UnsupportedModel, match="cannot read a text: chunk size must be non-zero"):
        encode.encode_text("abc", [Span(0, 3, False)])


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_the_machine_or_somebody_does_is_not_the_models_fault(error: BaseException) -> None:
    with pytest.raises(type(error)), as_unsupported("It"):
        raise error
