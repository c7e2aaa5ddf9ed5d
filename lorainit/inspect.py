"""Facts of a base model as JSON: `python -m lorainit inspect SOURCE`. Reads, never loads, the weights."""

from pathlib import Path

from pydantic import ValidationError

from lorainit.digest import base_sha256
from lorainit.errors import UnsupportedModel
from lorainit.facts import ModelFacts
from lorainit.model import experts
from lorainit.model.examine import examine
from lorainit.model.load import load_tokenizer, locate
from lorainit.model.targets import describe
from lorainit.model.vocabulary import require_known, require_rows
from lorainit.template import Template


def inspect(source: str, *, cache: Path, path: Path | None = None) -> ModelFacts:
    """What a catalogue needs to know of a base model.

    Args:
        source: as in `BaseModelRef.source`.
        cache: where a GGUF file is converted to.
        path: what `find` found for this source, if it was asked already.

    Raises:
        UnsupportedModel: it cannot be loaded as a causal language model, or no layer of it can carry a LoRA.
    """
    location = locate(source, cache=cache, path=path)
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
        "root": _root(source),
        "max_length": location.max_length or tokenizer.model_max_length,
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


def _root(source: str) -> str:
    if source.startswith("hub:"):
        return source.removeprefix("hub:").partition("@")[0]
    name = Path(source).name
    return name.split(".Q")[0].removesuffix(".gguf") if name.endswith(".gguf") else name
