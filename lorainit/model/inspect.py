"""Facts of a base model as JSON: `python -m lorainit inspect SOURCE`. Weights are hashed but not loaded as a model."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorainit.config.errors import UnsupportedModel
from lorainit.config.model_facts import MAX_SIDE, ModelFacts
from lorainit.config.sources import LOCAL, is_hub_id
from lorainit.data.chat.template import Template
from lorainit.model.layers import experts
from lorainit.model.load import load_tokenizer, locate_base
from lorainit.model.source.digest import base_sha256
from lorainit.model.source.examine import examine
from lorainit.model.source.files import MAX_CONFIG_BYTES, read_object
from lorainit.model.source.find import find
from lorainit.model.source.vocabulary import require_known, require_rows
from lorainit.model.targets.targets import describe

# The context length of a base without a limit, such as Mamba. Tokenizers write 1e30 for that, which is no usable
# length.
ENDLESS = 1 << 20


def inspect(source: str, *, cache: Path) -> ModelFacts:
    """The facts of a base model that a catalogue stores.

    Args:
        source: as in `BaseModelRef.source`.
        cache: the folder into which a GGUF file is converted.

    Raises:
        UnsupportedModel: it cannot be loaded as a causal language model, or no layer of it can carry a LoRA.
    """
    found = find(source)
    location = locate_base(source, cache=cache, path=found.path)
    model = examine(location.folder)
    experts.install(model)
    tokenizer = load_tokenizer(location.folder)
    require_rows(tokenizer, model)
    texts = [tokenizer("a")]
    if tokenizer.chat_template is not None:
        texts.append(tokenizer(Template(tokenizer).check(), add_special_tokens=False))
    require_known([text.input_ids for text in texts], tokenizer, model)
    targets, left_out = describe(model)
    if not targets:
        why = "; ".join(dict.fromkeys(f"{layer.name}: {layer.reason}" for layer in left_out)) or "none is linear"
        raise UnsupportedModel(f"No layer of the base model can carry a LoRA ({why}).", param="model")
    facts = {
        "root": found.hub_id or _root(found.path, location.folder),
        "source": found.source,
        "max_length": location.max_length or _context_of(model.config, tokenizer),
        "chat": tokenizer.chat_template is not None,
        "base_sha256": base_sha256(location.folder),
        "targets": targets,
        "left_out": left_out,
    }
    try:
        return ModelFacts.model_validate(facts)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(map(str, fault["loc"]))
        raise UnsupportedModel(
            f"No catalogue can offer the base model: {name}: {fault['msg']}.", param="model"
        ) from error


def _context_of(config: Any, tokenizer: Any) -> int:
    """The context length if config.json does not name it: transformers' default, else the tokenizer's."""
    text = config.get_text_config()
    known = int(getattr(text, "max_position_embeddings", None) or tokenizer.model_max_length)
    return known if known <= MAX_SIDE else ENDLESS


def _root(path: Path, folder: Path) -> str:
    """The base's name inside an adapter: the hub id in its config.json, or else a name that no hub can have."""
    if path.is_dir():
        said = read_object(folder / "config.json", MAX_CONFIG_BYTES).get("_name_or_path")
        if isinstance(said, str) and is_hub_id(said):
            return said
    return f"{LOCAL}{path.name.removesuffix('.gguf')}"
