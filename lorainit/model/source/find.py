"""Finds the folder or file of a base model from its source. Loads no torch and reads no file of a model."""

from dataclasses import dataclass
from pathlib import Path

from lorainit.config import sources
from lorainit.config.errors import HubUnavailable, UnsupportedModel
from lorainit.model.source import hub


@dataclass(frozen=True)
class Found:
    """A folder or a file on this host. `source` is valid in every folder; `hub_id` is its name on a hub, if any.

    If the given source names a branch on a hub, `source` names the commit, because a branch can change.
    """

    source: str
    path: Path
    hub_id: str | None


def find(source: str) -> Found:
    """Find a base model, and fetch it from the hub if that is where it is.

    Args:
        source: as `lorainit.config.sources` says; OWNER/NAME[@REVISION] means the hub if there is no such folder.

    Raises:
        UnsupportedModel: nothing is there.
        HubUnavailable: it may be on the hub, but the hub cannot be reached now.
    """
    path, on_hub = sources.local_path(source), sources.as_hub_id(source)
    if path is not None and sources.exists(path):
        folder = path.resolve() if ".." in path.parts else path.absolute()
        return Found(source if source.startswith(sources.PACKAGE) else str(folder), folder, hub.id_of(folder))
    if on_hub is None:
        raise UnsupportedModel(_nothing(source, path), param="model")
    try:
        folder = hub.fetch(*on_hub)
    except (UnsupportedModel, HubUnavailable) as error:
        if path is None:
            raise
        raise type(error)(f"There is no folder {path.absolute()}. {error.message}", param="model") from error
    return Found(hub.pin_source(on_hub[0], folder), folder, on_hub[0])


def _nothing(source: str, path: Path | None) -> str:
    if path is None:
        return f"{source!r} is not {sources.HUB}OWNER/NAME[@REVISION]."
    full_path = f" ({path.absolute()})" if "\0" not in source and not source.startswith("/") else ""
    return f"There is no base model at {source!r}{full_path}; a model of a hub is OWNER/NAME."
