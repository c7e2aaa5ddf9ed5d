"""Writes a tokenizer's files: copies of the base model's own or, if it has none, files that older versions can read.

Copies are preferred because any program that reads the base reads them too. transformers 5 would write names into
`tokenizer_config.json` that transformers 4 does not know.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from lorainit.config.errors import UnsupportedModel

# Only these files are copied, because none of them is code.
NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"  # a folder of named templates; `tool_use` is used for rows with tools
MAX_BYTES = 256 << 20  # for all files together; the largest known vocabulary (Gemma's, 262 144 tokens) takes 33 MB
# Entries that transformers 5 writes about the origin of a tokenizer. They are removed, because they are private.
_PRIVATE = ("backend", "is_local", "local_files_only", "processor_class", "tokenizer_file", "name_or_path")


def find_tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files of a base model.

    Raises:
        UnsupportedModel: they are larger than `MAX_BYTES`.
    """
    found = [path for name in NAMES if (path := folder / name).is_file()]
    if found:
        found += sorted(path for path in (folder / TEMPLATES).glob("*.jinja") if path.is_file())
    if sum(path.stat().st_size for path in found) > MAX_BYTES:
        raise UnsupportedModel(
            f"The base model's tokenizer files are larger than {MAX_BYTES >> 20} MiB together.", param="model"
        )
    return found


def copy(tokenizer: Any, folder: Path, out: Path) -> None:
    """Put the tokenizer into `out`: a copy of the files in `folder` or, if there are none, newly written files."""
    files = find_tokenizer_files(folder)
    for path in files:
        copied = out / path.relative_to(folder)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copied)
    if not files:
        write(tokenizer, out)


def write(tokenizer: Any, out: Path) -> None:
    """Save a fast tokenizer so that transformers 4.48 and later read it, with its chat template in the config."""
    tokenizer.save_pretrained(out, save_jinja_files=False)
    path = out / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in _PRIVATE}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Set explicitly, because transformers 4 removes spaces from decoded text by default and transformers 5 does not.
    config.setdefault("clean_up_tokenization_spaces", False)
    # Renamed, because transformers 4 expects a mapping under this name and calls the list additional_special_tokens.
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
