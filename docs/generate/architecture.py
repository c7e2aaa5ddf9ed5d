"""Sections of docs/architecture.md: which way imports run, and what each folder holds."""

import ast
import tomllib
from pathlib import Path

from docs.generate.marks import table

ROOT = Path(__file__).parents[2]
PACKAGES = ("api", "lorainit", "worker")


def imports() -> str:
    """The layers of each folder, from the contracts that import-linter checks."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = {one["containers"][0]: " ─► ".join(one["layers"]) for one in contracts if one["type"] == "layers"}
    width = max(map(len, layers))
    return "\n".join(["```", *(f"{folder:{width}}  {layers[folder]}" for folder in sorted(layers)), "```"])


def folders() -> str:
    """Every folder with the number of its files, without `__init__.py`, and its first paragraph."""
    found = sorted(path.parent for package in PACKAGES for path in (ROOT / package).rglob("__init__.py"))
    rows = [[f"`{folder.relative_to(ROOT)}/`", str(_count_files(folder)), _first_paragraph(folder)] for folder in found]
    return table(["folder", "files", ""], rows)


def _count_files(folder: Path) -> int:
    return sum(path.name != "__init__.py" for path in folder.glob("*.py"))


def _first_paragraph(folder: Path) -> str:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    if not text:
        raise ValueError(f"{folder.relative_to(ROOT)}/__init__.py does not say what the folder is for.")
    return " ".join(text.partition("\n\n")[0].split())
