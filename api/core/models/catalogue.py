"""The base models that the operator allows, from one TOML file. No other model can be trained.

It is an allow-list, so that no name in a request ever leads to a download (docs/decisions/0006).

An entry carries the facts that a request is checked against (target modules and their shapes), so
the web process never opens a model. `lorainit models inspect` writes an entry. Every process reads the file when it
starts, and does not start with a bad one. A file that changes later is used if `lorainit serve` would start with it.
Otherwise it is refused with a line in the log, and the previous entries stay in effect, because a mistake in a file
must not stop a running service.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError

from api.core import logs
from api.core.errors import BadReference, InvalidValue
from api.core.models import catalogue_file
from api.core.models.catalogue_file import BadCatalogue, CatalogueFile
from api.core.settings import get_settings
from lorainit.config import sources, target_modules
from lorainit.config.errors import LorainitError, UnsupportedInit
from lorainit.config.model_facts import NF4_BLOCK, ModelFacts
from lorainit.config.schema import Strict
from lorainit.config.spec import BaseModelRef, Lora, Rate, Root

ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"


def _checked_source(source: str) -> str:
    if source.startswith(sources.HUB) and sources.as_hub_id(source) is None:
        raise ValueError(f"{source!r} is not {sources.HUB}OWNER/NAME[@REVISION]")
    return source


Source = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_checked_source)]


class Entry(ModelFacts):
    """One base model: its public name, its source, and its facts. The pattern keeps ids apart from other names."""

    id: Annotated[str, Field(pattern=ID)]
    root: Root
    source: Source
    created: Annotated[int, Field(ge=0, le=2**53)] = 0
    max_r: Annotated[int, Field(ge=1)] = 256
    base_learning_rate: Rate | None = None

    def reference(self) -> BaseModelRef:
        """What a run needs to know of this model."""
        return BaseModelRef(
            id=self.id,
            source=self.source,
            root=self.root,
            max_length=self.max_length,
            weights=sum(target.weights for target in self.targets),
            base_learning_rate=self.base_learning_rate,
            sha256=self.base_sha256,
        )


class Catalogue(Strict):
    """The file as a whole."""

    models: Annotated[list[Entry], Field(min_length=1)]


def load(path: Path | None) -> dict[str, Entry]:
    """Every entry by its id; `None` = the built-in file. Sources are absolute, or relative to the file's folder.

    Raises:
        BadCatalogue: there is no such file, it is not TOML, or an entry is wrong.
    """
    file = path.absolute() if path is not None else resources.files("api.core.models") / "catalogue.toml"
    found = catalogue_file.read(file)
    try:
        return _entries(found, folder=path.absolute().parent if path is not None else Path())
    except BadCatalogue:
        raise
    except Exception as error:  # an unforeseen value in the file must not crash a running service
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise BadCatalogue(f"The catalogue {file} cannot be used: {why}.") from error


def _entries(found: CatalogueFile, *, folder: Path) -> dict[str, Entry]:
    try:
        models = Catalogue.model_validate(found.tables).models
    except ValidationError as error:
        raise found.fault(error) from error
    known: dict[str, Entry] = {}
    for index, entry in enumerate(models):
        if entry.id in known:
            raise found.at(("models", index, "id"), f"{entry.id!r} is there twice")
        try:
            source = sources.make_absolute(entry.source, folder=folder)
        except LorainitError as error:
            raise found.at(("models", index, "source"), error.message.removesuffix(".")) from error
        known[entry.id] = entry.model_copy(update={"source": source})
    return known


Stamp = tuple[int, int, int] | None  # differs between versions of a file; None = there is no file


@dataclass(frozen=True)
class _Held:
    """The entries in effect. `refused` says why the file as it is now is not in effect."""

    stamp: Stamp
    entries: dict[str, Entry]
    refused: str = ""


_held: dict[Path | None, _Held] = {}


def get_entries() -> dict[str, Entry]:
    """The catalogue in effect.

    Raises:
        BadCatalogue: as for `load`, and no good file was there before.
    """
    return _get_current().entries


def get_refusal() -> str:
    """Why the file as it is now is not in effect; "" when it is."""
    return _get_current().refused


def forget() -> None:
    """Read the file anew when it is next asked for."""
    _held.clear()


def _get_current() -> _Held:
    path = get_settings().catalogue
    # The file's stamp is compared each time, because reading it is cheap and parsing the file is not.
    stamp, held = _stamp(path), _held.get(path)
    if held is None or held.stamp != stamp:
        held = _held[path] = _read_again(path, stamp, held)
    return held


def _read_again(path: Path | None, stamp: Stamp, before: _Held | None) -> _Held:
    if before is None:
        return _Held(stamp, load(path))
    try:
        changed = load(path)
        missing = _explain_missing(changed.values()) if get_settings().base_models_here else []
        why = f"The catalogue {path} offers what is not here: {' '.join(missing)}" if missing else ""
    except BadCatalogue as error:
        changed, why = {}, str(error)
    if not why:
        return _Held(stamp, changed)
    logs.get_logger(__name__).error("the changed catalogue is refused; the previous one stays in effect", error=why)
    return _Held(stamp, before.entries, why)


def _stamp(path: Path | None) -> Stamp:
    try:
        facts = path.stat() if path is not None else None
    except OSError:
        return None
    return None if facts is None else (facts.st_mtime_ns, facts.st_size, facts.st_ino)


def find_missing_sources() -> list[str]:
    """A sentence for each base model whose files are not on this host. Models of a hub are downloaded when needed."""
    return _explain_missing(get_entries().values())


def _explain_missing(wanted: Iterable[Entry]) -> list[str]:
    return [why for entry in wanted if (why := _why_missing(entry))]


def _why_missing(entry: Entry) -> str:
    try:
        path = sources.local_path(entry.source)
    except LorainitError as error:
        return f"model {entry.id!r}: {error.message}"
    why = "" if path is None else _why_no_base(path)
    return why and f"model {entry.id!r}: its source, {path}, {why}."


def _why_no_base(path: Path) -> str:
    try:
        if path.is_dir():
            return "" if (path / "config.json").is_file() else "is a folder without a config.json"
        is_file = path.is_file()
    except OSError as error:  # a folder that may not be read, a name that is too long
        return f"cannot be read: {error.strerror}"
    return "" if is_file and path.suffix == ".gguf" else "is neither a folder nor a .gguf file"


def find(name: str) -> Entry | None:
    """An entry by id or by its hub name."""
    known = get_entries()
    return known.get(name) or next((entry for entry in known.values() if entry.root == name), None)


def require(name: str) -> Entry:
    """Like `find`, but a refusal when there is none."""
    entry = find(name)
    if entry is None:
        known = ", ".join(sorted(get_entries())) or "none"
        raise BadReference(
            f"model {name!r} cannot be fine-tuned here. Available: {known}.", code="model_not_available", param="model"
        )
    return entry


def resolve_targets(lora: Lora, entry: Entry) -> Lora:
    """`lora` with its target modules spelled out, checked against the model's shapes, and with what it leaves out.

    An entry may be wrong, so the run checks again with the model in hand.

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
        # A caller's `left_out` is ignored, because it is part of an earlier answer and chooses nothing.
        resolved = target_modules.resolve_target_modules(
            lora.model_copy(update={"left_out": []}), entry.targets, entry.left_out
        )
    except LorainitError as error:
        message = f"{error.message.removesuffix('.')} (model {entry.id!r})."
        code = "unsupported_combination" if isinstance(error, UnsupportedInit) else error.code
        raise InvalidValue(message, code=code, param=error.param) from error
    _require_groups_apart(lora, resolved.names, entry)
    return lora.model_copy(update={"target_modules": resolved.names, "left_out": resolved.left_out})


def _require_groups_apart(lora: Lora, names: list[str], entry: Entry) -> None:
    """Refuse a name that means layers of two groups, as `c_proj` does in entries of older versions."""
    if not isinstance(lora.target_modules, str):
        return
    chosen = [target for target in entry.targets if target.name in names]
    others = [t.name for t in chosen if lora.target_modules not in ("all-linear", t.group)]
    if others:
        raise InvalidValue(
            f"{others[0]!r} of model {entry.id!r} means layers of more groups than {lora.target_modules!r}: its"
            " catalogue entry was written by an older version. Write it again with `lorainit models inspect`.",
            code="invalid_value",
            param=target_modules.FIELD,
        )


def count_parameters(lora: Lora, entry: Entry) -> tuple[int, int]:
    """(adapted modules, trainable parameters) of an adapter whose targets are resolved."""
    names = tuple(lora.target_modules)
    counts = [target_modules.count_chosen(target, names) for target in entry.targets]
    parameters = sum(
        lora.count_parameters(target.out_features, target.in_features) * count
        for target, count in zip(entry.targets, counts, strict=True)
    )
    return sum(counts), parameters
