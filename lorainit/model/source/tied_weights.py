"""Checks weights that a configuration ties and that the files hold twice: both must be equal.

If they differ, programs load different models: transformers 5 uses both as they are stored, transformers 4 and most
others use the embedding as the output head too. Only such weights are read.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lorainit.config.errors import UnsupportedModel
from lorainit.model.source.files import Stored

CHUNK = 4096  # rows that are read at a time, so that the widest embeddings take about 100 MB


def require_same_where_tied(folder: Path, loaded: Any, stored: dict[str, Stored]) -> None:
    """Raise `UnsupportedModel` where the configuration ties two weights that the files store with different values.

    Args:
        loaded: the model as transformers has loaded it from `stored`, with or without contents: what it was given
            twice, it has not tied.
        stored: what the files' headers say.
    """
    for tied, source in loaded.all_tied_weights_keys.items():
        one, other = loaded.get_parameter(tied), loaded.get_parameter(source)
        if one is other:
            continue
        names = _stored_as(loaded, (tied, source), tuple(one.shape), stored)
        first = names[0]
        for name in names[1:]:
            if not _equal(folder, stored, first, name):
                raise UnsupportedModel(
                    f"config.json ties {tied} to {source} (tie_word_embeddings), and the files hold both, with"
                    f" different values ({first}, {name}): some readers would take the one and some the other. Set"
                    f" tie_word_embeddings to false if the model was trained with both, or leave {tied} out of the"
                    " files.",
                    param="model",
                )


def _stored_as(model: Any, names: tuple[str, str], shape: tuple[int, ...], stored: dict[str, Stored]) -> list[str]:
    """What the files call these weights; where they were renamed, whatever has their shape."""
    prefix = f"{model.base_model_prefix}."
    found = [next((n for n in (name, name.removeprefix(prefix)) if n in stored), None) for name in names]
    exact = [name for name in found if name is not None]
    return exact if len(exact) == len(names) else sorted(n for n, weight in stored.items() if weight.shape == shape)


def _equal(folder: Path, stored: dict[str, Stored], one: str, other: str) -> bool:
    same_type = stored[one].dtype == stored[other].dtype
    with (
        safe_open(folder / stored[one].file, "pt") as first,
        safe_open(folder / stored[other].file, "pt") as second,
    ):
        a, b = first.get_slice(one), second.get_slice(other)
        for start in range(0, stored[one].shape[0], CHUNK):
            x, y = a[start : start + CHUNK], b[start : start + CHUNK]
            if same_type:  # compared as bytes, because NaN is not equal to itself
                x, y = x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)
            if not torch.equal(x, y):
                return False
    return True
