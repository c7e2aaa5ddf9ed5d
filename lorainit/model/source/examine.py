"""Checks that a folder holds a base that can be trained: text only, causal, and complete. No weight is loaded.

Called when a model is inspected and again before a run loads it (docs/decisions/0029).
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    __version__,
)

from lorainit.config.errors import UnsupportedModel
from lorainit.model.source.causal import require_causal
from lorainit.model.source.completeness import collect_logs, require_complete
from lorainit.model.source.files import MAX_CONFIG_BYTES, check_folder, list_stored_weights, read_object
from lorainit.runtime.refusal import as_unsupported


def examine(folder: Path) -> nn.Module:
    """The base's modules without weights (on the meta device), after all checks have passed.

    Raises:
        UnsupportedModel: it is not a causal language model, or its files are broken or incomplete.
    """
    check_folder(folder)
    with collect_logs():
        config = read_config(folder)
        require_language_model(config)
        _require_as_many_weights_as_layers(folder, config)
        model = build(config)
        with as_unsupported("The base model's files cannot be compared with its config.json"):
            require_complete(folder, model)
        with as_unsupported("The base model cannot be tried"):
            require_causal(config, model)
    return model


def read_config(folder: Path) -> Any:
    """The folder's configuration, as transformers understands it.

    Raises:
        UnsupportedModel: transformers does not understand it, or the weights are quantized.
    """
    said = read_object(folder / "config.json", MAX_CONFIG_BYTES)
    _require_known_architecture(said)
    _require_known_rope(said)
    with as_unsupported("The base model's config.json cannot be read"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel("The base model is quantized: use its full-precision weights.", param="model")
    return config


def _require_known_rope(said: dict[str, Any]) -> None:
    """Refuse Phi-3's older name of longrope, because transformers 5 then reports that another key is missing."""
    rope = said.get("rope_scaling") or said.get("rope_parameters")
    if isinstance(rope, dict) and "su" in (rope.get("type"), rope.get("rope_type")):
        raise UnsupportedModel(
            f"config.json calls its rope scaling 'su', an older name of longrope that transformers {__version__} does"
            " not read: write 'longrope' there.",
            param="model",
        )


def _require_known_architecture(said: dict[str, Any]) -> None:
    """Refuse an unknown architecture here, because transformers' message shows the folder's path and advises to trust
    the model's code."""
    if (kind := said.get("model_type")) in CONFIG_MAPPING:
        return
    why = f"The base model is of the architecture {str(kind)[:100]!r}, which transformers {__version__} does not have"
    if "auto_map" in said:
        why += "; its folder brings code of its own for it (auto_map in config.json), and such code is never run"
    raise UnsupportedModel(f"{why}.", param="model")


def build(config: Any) -> nn.Module:
    """The model of a configuration without any weights.

    Raises:
        UnsupportedModel: it cannot be built; if a value is unknown to transformers, the message names its entry.
    """
    try:
        with as_unsupported("The base model cannot be built from its config.json"), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-any-return]
    except UnsupportedModel as error:
        cause = error.__cause__
        name = _entry_with(cause.args[0], config.to_dict()) if isinstance(cause, KeyError) and cause.args else None
        if name is None:
            raise
        said = f"config.json says {name} = {str(cause.args[0])[:100]!r}" if cause else ""
        raise UnsupportedModel(f"{said}, which transformers {__version__} does not have.", param="model") from error


def _entry_with(value: object, config: dict[str, Any]) -> str | None:
    """The dotted name of the first entry of a configuration that has this value."""
    for name, item in config.items():
        if item == value:
            return name
        if isinstance(item, dict) and (inner := _entry_with(value, item)):
            return f"{name}.{inner}"
    return None


def require_language_model(config: Any) -> None:
    """Raise `UnsupportedModel` unless transformers has a language model without an encoder for this configuration."""
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder and a decoder, and only models that are one decoder are trained"
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    elif type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "vision_config" in getattr(config, "sub_configs", {}):
        what = "text and vision in one model, and only models of text alone are trained"
    else:
        what = "of an architecture for which transformers has no causal language model"
    raise UnsupportedModel(f"The base model ({config.model_type}) is {what}.", param="model")


def _require_as_many_weights_as_layers(folder: Path, config: Any) -> None:
    """Refuse more layers than there are weights, because building a billion layers would never end."""
    layers, weights = getattr(config.get_text_config(), "num_hidden_layers", 0), len(list_stored_weights(folder))
    if isinstance(layers, int) and layers > weights:
        raise UnsupportedModel(
            f"config.json says num_hidden_layers = {layers}, and the files hold {weights} weights.", param="model"
        )
