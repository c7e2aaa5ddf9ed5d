"""The record of what a process was set to before its run, and why: for its events and for the manifest.

Settings of a process are global, and so is this record. Whoever chooses one writes it down here. Loads no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Setting:
    """One setting: what it is set to, why, and what was measured for it."""

    name: str
    value: str
    why: str
    measured: Mapping[str, float] = field(default_factory=dict)


_record: dict[str, Setting] = {}


def record(setting: Setting) -> None:
    """Add a setting to the record; it replaces an earlier one of the same name."""
    _record[setting.name] = setting


def recorded() -> tuple[Setting, ...]:
    """What was set in this process, in order; empty where nothing was."""
    return tuple(_record.values())


def values() -> dict[str, str]:
    """What was set, by name, for the manifest."""
    return {setting.name: setting.value for setting in recorded()}
