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
from lorainit import placement
from lorainit.errors import LorainitError, UnsupportedInit
from lorainit.facts import NF4_BLOCK, ModelFacts
from lorainit.schema import Strict
from lorainit.spec import BaseModelRef, Lora


class Entry(ModelFacts):
    """One base model: its public name, where it is, and its facts."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    source: str
    created: int = 0
    max_r: Annotated[int, Field(ge=1)] = 256
    base_learning_rate: Annotated[float, Field(gt=0)] | None = None

    def reference(self) -> BaseModelRef:
        """What a run needs to know of this model."""
        return BaseModelRef(
            id=self.id,
            source=self.source,
            root=self.root,
            max_length=self.max_length,
            weights=sum(target.weights for target in self.targets),
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
    """`lora` with its target modules spelled out, checked against the model's shapes, and with what it leaves out.

    Raises:
        InvalidValue: a target that is unknown or cannot carry a LoRA, a rank above `max_r` or above a named matrix's
            smaller side, an initialization that needs more directions than that side has, a quantization that the
            model cannot have, or experts of a mixture under DoRA or LoftQ.
    """
    if lora.quantization and lora.quantization not in entry.quantization:
        raise InvalidValue(
            f"lora.quantization {lora.quantization!r} does not fit model {entry.id!r}: the inputs of one of its"
            f" layers are not a multiple of the block size, {NF4_BLOCK}.",
            code="unsupported_combination",
            param="lora.quantization",
        )
    if lora.r > entry.max_r:
        raise InvalidValue(
            f"lora.r must be between 1 and {entry.max_r} for model {entry.id!r} (got {lora.r}).",
            code="rank_too_large",
            param="lora.r",
        )
    try:
        # What a caller says of `left_out` is no order: it may be the answer to an earlier one.
        placed = placement.place(lora.model_copy(update={"left_out": []}), entry.targets, entry.left_out)
    except LorainitError as error:
        message = f"{error.message.removesuffix('.')} (model {entry.id!r})."
        code = "unsupported_combination" if isinstance(error, UnsupportedInit) else error.code
        raise InvalidValue(message, code=code, param=error.param) from error
    _require_groups_apart(lora, placed.names, entry)
    return lora.model_copy(update={"target_modules": placed.names, "left_out": placed.left_out})


def _require_groups_apart(lora: Lora, names: list[str], entry: Entry) -> None:
    """An entry of an older version has names (`c_proj`) that mean layers of two groups."""
    if not isinstance(lora.target_modules, str):
        return
    chosen = [target for target in entry.targets if target.name in names]
    others = [t.name for t in chosen if lora.target_modules not in ("all-linear", t.group)]
    if others:
        raise InvalidValue(
            f"{others[0]!r} of model {entry.id!r} means layers of more groups than {lora.target_modules!r}: its"
            " catalogue entry was written by an older version. Write it again with `lorainit models inspect`.",
            code="invalid_value",
            param=placement.FIELD,
        )


def size(lora: Lora, entry: Entry) -> tuple[int, int]:
    """(adapted modules, trainable parameters) of a placed adapter."""
    counts = [placement.chosen(target, lora.target_modules) for target in entry.targets]
    parameters = sum(
        lora.parameters(target.out_features, target.in_features) * count
        for target, count in zip(entry.targets, counts, strict=True)
    )
    return sum(counts), parameters
