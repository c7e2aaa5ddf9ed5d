"""The tokens at which a model stops: what an answer has to end with, or the adapter never learns to end one."""

import json
from pathlib import Path
from typing import Any

from lorainit.system.host_failure import is_host_failure


def stop_tokens(tokenizer: Any, folder: Path | None = None) -> frozenset[int]:
    """Ids: the tokenizer's end token, and those of generation_config.json (config.json if there is none of it).

    Args:
        folder: the base model's; None = only the tokenizer is asked.
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
            raise  # else a run would learn to stop at other tokens
        return set()
    value = config.get("eos_token_id") if isinstance(config, dict) else None
    return {i for i in (value if isinstance(value, list) else [value]) if type(i) is int}
