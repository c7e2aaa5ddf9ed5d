"""Takes this host's paths out of what a run says: its reader is elsewhere, and knows the model by its id.

The library names folders, which helps whoever runs it by hand. What libraries below it say has paths of their own.
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

# An absolute path of at least two parts, but for addresses (`https://…`) and parts of relative paths.
_PATH = re.compile(r"(?<![\w:/.~-])(/[\w.@+~-]+)(?:/[\w.@+~-]+)+/?")
_SHOWN = (Stage, Message, Plan, InitReport, Done, Failed)


def public_names(job: Job, folder: Path) -> dict[str, str]:
    """What a reader knows the places of a run by.

    Args:
        folder: the run's own, whose files are told by their names in it.
    """
    names = {f"{folder}/": "", f"{folder.resolve()}/": ""}
    entry = catalogue.find(job.model)
    try:
        source = sources.local_path(entry.source) if entry else None
    except LorainitError:  # the package that it lies in is not here
        source = None
    return names | ({str(source): job.model, str(source.resolve()): job.model} if source else {})


def redact_paths(event: Event, names: Mapping[str, str]) -> Event:
    """The event as it may be shown. Where a checkpoint or an adapter lies is for the worker, and stays."""
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
    """The text with paths called by their names; of others that begin on this host, the last part is left."""
    if "/" not in text:
        return text
    for path in sorted(names, key=len, reverse=True):
        end = "" if path.endswith("/") else r"(?![\w-])"  # no longer name that begins so
        text = re.sub(re.escape(path) + end, names[path], text)
    return _PATH.sub(_last_part, text)


def _last_part(found: re.Match[str]) -> str:
    # A route or a place in a JSON document begins nowhere; devices, and /dev/shm, have their names on every host.
    here = Path(found[1]).exists() and found[1] != "/dev"
    return Path(found[0]).name if here else found[0]
