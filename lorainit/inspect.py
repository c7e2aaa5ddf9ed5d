"""Facts of a base model as JSON: `python -m lorainit inspect SOURCE`. Reads, never loads, the weights."""

from collections import Counter
from pathlib import Path

from pydantic import ValidationError
from torch import nn

from lorainit.digest import base_sha256
from lorainit.errors import UnsupportedModel
from lorainit.model import experts
from lorainit.model.examine import examine
from lorainit.model.load import load_tokenizer, locate
from lorainit.model.targets import Group, group_of, linear_layers
from lorainit.spec import ModelFacts, Target
from lorainit.template import Template
from lorainit.weight import shape_of


def inspect(source: str, *, cache: Path, path: Path | None = None) -> ModelFacts:
    """What a catalogue needs to know of a base model.

    Args:
        source: as in `BaseModelRef.source`.
        cache: where a GGUF file is converted to.
        path: what `find` found for this source, if it was asked already.

    Raises:
        UnsupportedModel: it cannot be loaded as a causal language model.
    """
    location = locate(source, cache=cache, path=path)
    model = examine(location.folder)
    experts.install(model)
    tokenizer = load_tokenizer(location.folder)
    if tokenizer.chat_template is not None:
        Template(tokenizer).check()
    facts = {
        "root": _root(source),
        "max_length": location.max_length or tokenizer.model_max_length,
        "chat": tokenizer.chat_template is not None,
        "base_sha256": base_sha256(location.folder),
        "targets": targets(model),
    }
    try:
        return ModelFacts.model_validate(facts)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(map(str, fault["loc"]))
        raise UnsupportedModel(
            f"No catalogue can offer the base model: {name}: {fault['msg']}.", param="model"
        ) from error


def targets(model: nn.Module) -> list[Target]:
    """The kinds of linear layers of a model, in order of first appearance; each expert's matrix counts as one."""
    kinds: Counter[tuple[str, Group, int, int, bool]] = Counter()
    for name, module in linear_layers(model).items():
        out, n = shape_of(module)
        kinds[experts.short_name(name, module), group_of(name), out, n, isinstance(module, experts.ExpertLinear)] += 1
    return [
        Target(name=name, group=group, out_features=out, in_features=n, count=count, experts=of_experts)
        for (name, group, out, n, of_experts), count in kinds.items()
    ]


def _root(source: str) -> str:
    if source.startswith("hub:"):
        return source.removeprefix("hub:").partition("@")[0]
    name = Path(source).name
    return name.split(".Q")[0].removesuffix(".gguf") if name.endswith(".gguf") else name
