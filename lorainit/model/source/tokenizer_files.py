"""A tokenizer as files: those of a base model byte for byte, or, where it has none, such as old readers can read.

transformers 5 writes names into `tokenizer_config.json` that transformers 4 does not know. A download that
carries the base's own files is read by whatever reads the base. Knows nothing of adapters.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from lorainit.config.errors import UnsupportedModel

# No other file is copied: none of these is code.
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
TEMPLATES = "additional_chat_templates"  # a folder of them, by name: `tool_use` is taken for rows with tools
MAX_BYTES = 256 << 20  # of all of them; the largest known vocabulary (Gemma's, 262 144 tokens) takes 33 MB
# Where a tokenizer came from, which transformers 5 writes beside what it is.
_PRIVATE = ("backend", "is_local", "local_files_only", "processor_class", "tokenizer_file", "name_or_path")


def own_files(folder: Path) -> list[Path]:
    """The tokenizer files of a base model.

    Raises:
        UnsupportedModel: they are larger than any tokenizer is.
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
    """Put the tokenizer into `out`: the files of `folder` byte for byte or, if there are none, written anew."""
    files = own_files(folder)
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
    # transformers 4 takes spaces out of decoded text unless it is told not to; 5 does not.
    config.setdefault("clean_up_tokenization_spaces", False)
    # A list under this name is additional_special_tokens to transformers 4, which wants a mapping here.
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
