"""A record of the settings that were chosen for this process, and why, for events and for the manifest.

The record is global because such settings are global to the process. Code that chooses a setting records it here. Loads
no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Setting:
    """One setting: its value, the reason for it, and what was measured to choose it."""

    name: str
    value: str
    why: str
    measured: Mapping[str, float] = field(default_factory=dict)


_record: dict[str, Setting] = {}


def record(setting: Setting) -> None:
    """Add a setting to the record; it replaces an earlier one of the same name."""
    _record[setting.name] = setting


def list_recorded() -> tuple[Setting, ...]:
    """The settings of this process in order; empty if nothing was set."""
    return tuple(_record.values())


def values() -> dict[str, str]:
    """The settings as name and value, for the manifest."""
    return {setting.name: setting.value for setting in list_recorded()}
