"""The base models the operator allows, from one TOML file. Nothing else can be trained.

An entry carries the facts that a request is checked against (target modules and their shapes), so
the web process never opens a model. `lorainit models inspect` writes an entry.
"""

import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from api.core.errors import BadReference, InvalidValue
from api.core.settings import get_settings
from lorainit.inits import Automatic
from lorainit.schema import Strict
from lorainit.spec import NF4_BLOCK, BaseModelRef, Lora, ModelFacts, Target


class Entry(ModelFacts):
    """One base model: its public name, where it is, and its facts."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    source: str
    created: int = 0
    max_r: Annotated[int, Field(ge=1)] = 256
    base_learning_rate: Annotated[float, Field(gt=0)] = 2e-4

    def reference(self) -> BaseModelRef:
        """What a run needs to know of this model."""
        return BaseModelRef(
            id=self.id,
            source=self.source,
            root=self.root,
            max_length=self.max_length,
            base_learning_rate=self.base_learning_rate,
        )


class Catalogue(Strict):
    """The file as a whole."""

    models: list[Entry]


@cache
def load(path: Path | None) -> dict[str, Entry]:
    """Every entry by its id; `None` = the built-in file.

    Raises:
        ValueError: the file is not valid TOML or an entry is wrong; the message names it.
    """
    source = path if path is not None else resources.files("api.core") / "catalogue.toml"
    try:
        parsed = Catalogue.model_validate(tomllib.loads(source.read_text("utf-8")))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise ValueError(f"catalogue {source}: {error}") from error
    return {entry.id: entry for entry in parsed.models}


def entries() -> dict[str, Entry]:
    """The catalogue in effect."""
    return load(get_settings().catalogue)


def find(name: str) -> Entry | None:
    """An entry by id or by its hub name."""
    known = entries()
    return known.get(name) or next((entry for entry in known.values() if entry.root == name), None)


def require(name: str) -> Entry:
    """Like `find`, but a refusal when there is none."""
    entry = find(name)
    if entry is None:
        known = ", ".join(sorted(entries())) or "none"
        raise BadReference(
            f"model {name!r} cannot be fine-tuned here. Available: {known}.", code="model_not_available", param="model"
        )
    return entry


def place(lora: Lora, entry: Entry) -> Lora:
    """`lora` with its target modules spelled out, checked against the model's shapes.

    Raises:
        InvalidValue: an unknown target, a rank above `max_r` or above a matrix's smaller side, an
            initialization that needs more directions than that side has, a quantization that the
            model cannot have, or experts of a mixture under DoRA or LoftQ, which would leave them out of a group.
    """
    if lora.quantization and lora.quantization not in entry.quantization:
        raise InvalidValue(
            f"lora.quantization {lora.quantization!r} does not fit model {entry.id!r}: the inputs of one of its"
            f" layers are not a multiple of the block size, {NF4_BLOCK}.",
            code="unsupported_combination",
            param="lora.quantization",
        )
    known = dict.fromkeys(target.name for target in entry.targets)
    wanted = lora.target_modules
    if isinstance(wanted, str):
        fitting = [target for target in entry.targets if _why_no_experts(lora, target) is None]
        names = list(dict.fromkeys(t.name for t in fitting if wanted in ("all-linear", t.group)))
        if not names:
            raise InvalidValue(
                f"lora.target_modules {wanted!r} matches nothing in model {entry.id!r}.",
                code="invalid_value",
                param="lora.target_modules",
            )
    else:
        names = list(wanted)
        for index, name in enumerate(names):
            if name not in known:
                raise InvalidValue(
                    f"lora.target_modules[{index}] {name!r} is not a linear layer of model {entry.id!r}. "
                    f"Available: {', '.join(known)}.",
                    code="invalid_value",
                    param=f"lora.target_modules[{index}]",
                )
    _refuse_experts(lora, names, entry)
    if lora.r > entry.max_r:
        raise InvalidValue(
            f"lora.r must be between 1 and {entry.max_r} for model {entry.id!r} (got {lora.r}).",
            code="rank_too_large",
            param="lora.r",
        )
    for target in entry.targets:
        side = min(target.out_features, target.in_features)
        if target.name in names and lora.r > side:
            raise InvalidValue(
                f"lora.r {lora.r} is larger than the smaller side ({side}) of {target.name!r} in model {entry.id!r}.",
                code="rank_too_large",
                param="lora.r",
            )
        needed = lora.r if isinstance(lora.init, Automatic) else lora.init.smaller_side(lora.r)
        if target.name in names and needed > side:
            raise InvalidValue(
                f"lora.init {lora.init.method!r} at rank {lora.r} needs {needed} directions, more than the smaller side"
                f" ({side}) of {target.name!r} in model {entry.id!r}.",
                code="rank_too_large",
                param="lora.init",
            )
    return lora.model_copy(update={"target_modules": names})


def _why_no_experts(lora: Lora, target: Target) -> str | None:
    """A clause if this target is one of experts, which such an adapter cannot be on; the run's events say it too."""
    if not target.experts:
        return None
    if lora.use_dora:
        return "PEFT has no DoRA for experts"
    return (
        "NF4 leaves experts as they are, which leaves LoftQ nothing to correct" if lora.init.method == "loftq" else None
    )


def _refuse_experts(lora: Lora, names: list[str], entry: Entry) -> None:
    for target in entry.targets:
        if target.name in names and (why := _why_no_experts(lora, target)):
            raise InvalidValue(
                f"lora.target_modules {target.name!r} cannot be adapted like this: {why}.",
                code="unsupported_combination",
                param="lora.use_dora" if lora.use_dora else "lora.init",
            )


def size(lora: Lora, entry: Entry) -> tuple[int, int]:
    """(adapted modules, trainable parameters) of a placed adapter."""
    chosen = [target for target in entry.targets if target.name in lora.target_modules]
    parameters = sum(lora.parameters(target.out_features, target.in_features) * target.count for target in chosen)
    return sum(target.count for target in chosen), parameters
