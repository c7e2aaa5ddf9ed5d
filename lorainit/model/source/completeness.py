"""Checks that a model's files hold all weights of the model and nothing else, without reading a weight.

transformers itself is used for the check: it loads empty tensors with the names and shapes of the files' headers, with
all the renaming, fusing and tying of a real load. So the check agrees with what a run does later.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from lorainit.config.errors import UnsupportedModel
from lorainit.model.source.files import Stored, list_first, list_stored_weights
from lorainit.model.source.tied_weights import require_same_where_tied
from lorainit.runtime.machine_errors import is_machine_failure

# Names that may be in transformers' report although nothing is wrong. Until 2022 causal masks were saved like weights
# (the hub's gpt2 has them; codegen calls them causal_mask). They are recognized by name and shape.
_OLD_MASK = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias|\w*mask)$")
_OLD_TABLE = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)position_ids$")


def require_complete(folder: Path, skeleton: nn.Module) -> None:
    """Raise `UnsupportedModel` unless the folder's files and the model's weights are the same, by name and shape.

    Weights are floating point numbers, and what is tied may be stored twice only with the same values.

    Args:
        skeleton: the folder's model on the meta device; not changed.
    """
    stored = list_stored_weights(folder)
    held = {name: _hollow(weight) for name, weight in stored.items()}
    kind: Any = type(skeleton)
    with collect_logs() as complaints:
        try:
            loaded, report = kind.from_pretrained(
                None,
                config=skeleton.config,
                state_dict=held,
                device_map={"": "meta"},
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except RuntimeError as error:
            if is_machine_failure(error):
                raise
            raise _unfit(complaints, stored) from error
    require_nothing_left(report, stored)
    _require_floating(skeleton, stored)
    _require_one_name(skeleton, stored)
    require_same_where_tied(folder, loaded, stored)


def _require_floating(skeleton: Any, stored: dict[str, Stored]) -> None:
    """Refuse weights that are not floating point, because transformers would cast quantized integers wrongly."""
    whole = {name for name, buffer in skeleton.named_buffers() if not buffer.is_floating_point()}
    whole |= {name.removeprefix(f"{skeleton.base_model_prefix}.") for name in whole}
    for name, weight in stored.items():
        number = weight.dtype.startswith(("F", "BF"))
        if not number and name not in whole and not _is_leftover(name, weight.shape):
            raise _refusal(
                f"{name} is stored as {weight.dtype}, and weights are floating point numbers: if the model is"
                " quantized, use its full-precision weights."
            )


def _require_one_name(skeleton: Any, stored: dict[str, Stored]) -> None:
    """Refuse a weight that is stored with and without the base model's prefix, because transformers takes only one."""
    prefix = f"{skeleton.base_model_prefix}."
    for name in stored:
        if f"{prefix}{name}" in stored:
            raise _refusal(f"The base model's files hold one weight under two names: {name} and {prefix}{name}.")


def require_nothing_left(report: dict[str, Any], stored: dict[str, Stored] | None = None) -> None:
    """Raise `UnsupportedModel` where transformers' loading report names a weight.

    Args:
        stored: what the files hold, where that is known.
    """
    shapes = {name: weight.shape for name, weight in (stored or {}).items()}
    left = [name for name in report["unexpected_keys"] if not _is_leftover(name, shapes.get(name))]
    if missing := sorted(report["missing_keys"]):
        raise _refusal(f"The base model's files lack {_weights(missing)} of the model: {list_first(missing)}.")
    if wrong := sorted((name, tuple(found), tuple(wanted)) for name, found, wanted in report["mismatched_keys"]):
        name, found, wanted = wrong[0]
        raise _refusal(
            f"{_weights(wrong)} in the base model's files have other shapes than its config.json says:"
            f" {name} has {list(found)} where {list(wanted)} is wanted."
        )
    if left:
        raise _refusal(
            f"The base model's files hold {_weights(left)} that the causal language model of its config.json has no use"
            f" for: {list_first(left)}."
        )


def _is_leftover(name: str, shape: tuple[int, ...] | None) -> bool:
    """Whether this is a table or a mask that an old version of transformers saved; such entries are no weights."""
    square = shape is not None and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return bool(_OLD_TABLE.search(name) or (_OLD_MASK.search(name) and (square or shape == ())))


def _weights(names: list[Any]) -> str:
    return "1 weight" if len(names) == 1 else f"{len(names)} weights"


def _hollow(weight: Stored) -> Tensor:
    # Always float32, because a tensor of integers could not become a parameter; the check of types is separate.
    return torch.empty(weight.shape, dtype=torch.float32, device="meta")


def _unfit(complaints: list[str], stored: dict[str, Stored]) -> UnsupportedModel:
    """The error for weights whose shapes do not allow transformers' joining or splitting."""
    text = " ".join(" ".join(complaints).split())
    named = [name for name in stored if name in text]
    where = list_first(named) if named else text[-300:]
    return _refusal(f"Weights in the base model's files do not fit together: {where}.")


def _refusal(message: str) -> UnsupportedModel:
    return UnsupportedModel(message, param="model")


@contextmanager
def collect_logs() -> Iterator[list[str]]:
    """Collect what transformers would log inside, and draw no progress bars."""
    said: list[str] = []
    logger = transformers_logging.get_logger("transformers")
    collector = _Collector(said)
    handlers, level, bars = logger.handlers[:], logger.level, transformers_logging.is_progress_bar_enabled()
    logger.handlers[:] = [collector]
    logger.setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        yield said
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


class _Collector(logging.Handler):
    """Keeps the messages."""

    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.said.append(record.getMessage())
