"""The tokens at which a model stops. An answer has to end with one, otherwise the adapter never learns to stop."""

import json
from pathlib import Path
from typing import Any

from lorainit.system.host_failure import is_host_failure


def stop_tokens(tokenizer: Any, folder: Path | None = None) -> frozenset[int]:
    """Ids of the tokenizer's end token and of those in generation_config.json (in config.json, if it names none).

    Args:
        folder: the base model's; None = only the tokenizer's end token.

    Raises:
        OSError: the host could not read a file.
    """
    found = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    for name in ("generation_config.json", "config.json") if folder else ():
        assert folder is not None
        if ids := _ids(folder / name):
            return frozenset(found | ids)
    return frozenset(found)


def _ids(path: Path) -> set[int]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        if is_host_failure(error):
            raise  # otherwise the run would silently learn to stop at other tokens
        return set()
    value = config.get("eos_token_id") if isinstance(config, dict) else None
    return {i for i in (value if isinstance(value, list) else [value]) if type(i) is int}
