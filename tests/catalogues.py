"""Catalogues for tests: what `lorainit models inspect` writes, without the two processes that load torch for it.

That the command writes the same: tests/api/cli/test_commands.py.
"""

from pathlib import Path

from api.cli.tables import format_catalogue_entry


def describe_base(folder: Path, *, model_id: str, root: str) -> str:
    """The catalogue entry of the base model in a folder, which is trusted."""
    from lorainit.model.inspect import inspect  # which loads torch

    facts = inspect(str(folder), cache=folder.parent)
    return format_catalogue_entry(facts.model_copy(update={"root": root}), model_id=model_id, given=True)
