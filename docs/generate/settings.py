"""docs/settings.md: every setting with its default and what it means."""

from api.core.settings import PREFIX, Settings
from docs.generate.marks import table


def settings() -> str:
    """One row for each field of `Settings`."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        rows.append([f"`{PREFIX}{name.upper()}`", default, field.description or ""])
    return table(["variable", "default", "meaning"], rows)
