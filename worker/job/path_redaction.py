"""Removes this host's paths from a run's events, because their readers do not have this host.

Our library names folders because that helps people who run it by hand. Messages of other libraries contain paths, too.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from api.core.db.tables import Job
from api.core.models import catalogue
from lorainit.config import sources
from lorainit.config.errors import LorainitError
from lorainit.config.events import Done, Event, Failed, InitReport, Message, Plan, Stage

# An absolute path of at least two parts. Addresses (`https://…`) and parts of relative paths do not match.
_PATH = re.compile(r"(?<![\w:/.~-])(/[\w.@+~-]+)(?:/[\w.@+~-]+)+/?")
_SHOWN = (Stage, Message, Plan, InitReport, Done, Failed)


def find_public_names(job: Job, folder: Path) -> dict[str, str]:
    """Public names for the paths of a run: its model's id, and file names relative to its folder.

    Args:
        folder: the run's own folder.
    """
    names = {f"{folder}/": "", f"{folder.resolve()}/": ""}
    entry = catalogue.find(job.model)
    try:
        source = sources.local_path(entry.source) if entry else None
    except LorainitError:  # the package that contains the model is not installed here
        source = None
    return names | ({str(source): job.model, str(source.resolve()): job.model} if source else {})


def redact_paths(event: Event, names: Mapping[str, str]) -> Event:
    """The event without paths of this host. Those of a checkpoint and an adapter stay: the worker needs them."""
    if not isinstance(event, _SHOWN):
        return event
    shown = _redact(event.model_dump(exclude={"adapter"}), names)
    if isinstance(event, Done):
        shown["adapter"] = event.adapter
    return type(event).model_validate(shown)


def _redact(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return redact_text(value, names)
    if isinstance(value, dict):
        return {key: _redact(part, names) for key, part in value.items()}
    return [_redact(part, names) for part in value] if isinstance(value, list | tuple) else value


def redact_text(text: str, names: Mapping[str, str]) -> str:
    """The text with paths replaced by their names. Of other paths on this host, only the last part is kept."""
    if "/" not in text:
        return text
    for path in sorted(names, key=len, reverse=True):
        end = "" if path.endswith("/") else r"(?![\w-])"  # not a longer name that begins in the same way
        text = re.sub(re.escape(path) + end, names[path], text)
    return _PATH.sub(_last_part, text)


def _last_part(found: re.Match[str]) -> str:
    # Routes and JSON pointers look like paths, but do not exist here. Names in /dev are the same on every host.
    here = Path(found[1]).exists() and found[1] != "/dev"
    return Path(found[0]).name if here else found[0]
