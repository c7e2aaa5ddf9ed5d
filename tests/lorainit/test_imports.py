"""What the engine's modules load when they are imported."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorainit

MODULES = sorted(Path(lorainit.__file__).parent.rglob("*.py"))


def _loaded(path: Path) -> Iterator[str]:
    """The packages that a module imports when it is imported itself."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def test_there_are_modules_to_look_at() -> None:
    assert sum("torch" in _loaded(path) for path in MODULES) > 20


@pytest.mark.parametrize("package", ["peft", "bitsandbytes"])
def test_peft_is_imported_only_when_it_is_asked(package: str) -> None:
    assert [path.name for path in MODULES if package in _loaded(path)] == []
