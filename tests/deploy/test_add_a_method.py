"""docs/add-a-method.md, followed on a copy of the repository: its blocks, its commands, and what they promise."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("api", "worker", "lorainit", "migrations", "docs", "benchmarks", "tests", "examples")
PAGE = (ROOT / "docs" / "add-a-method.md").read_text()
BLOCK = re.compile(r"^```python title=(\S+)(?: in=(\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPEC = re.compile(r"^```json title=(\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
READ_SPEC = "import sys; from lorainit.config.spec import RunSpec; RunSpec.model_validate_json(sys.argv[1])"
OWN = "tests/lorainit/init/methods/test_halves.py"
COMMAND = re.compile(r"^\.venv/bin/python -m pytest (.+)$", re.MULTILINE)


class Copy:
    """The repository as a contributor has it, without what is ignored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in (*ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / "Makefile", ROOT / "LICENSE"):
            shutil.copy(path, folder)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """One command of the page, in the copy and with its code."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("OPENAI_BASE_URL", None)
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    made = Copy(tmp_path_factory.mktemp("copy"))
    for path, table, block in BLOCK.findall(PAGE):
        _write(made, path, table, block)
    return made


def _write(copy: Copy, path: str, table: str, block: str) -> None:
    """A block of the page: a line of a table, the end of a file that is there, or a new file."""
    file = copy.folder / path
    if table:
        head, rest = re.split(rf"^(?={table}: dict.*$)", file.read_text(), maxsplit=1, flags=re.MULTILINE)
        file.write_text(head + rest.replace("\n}\n", f"\n{block}}}\n", 1))
    elif file.exists():
        file.write_text(f"{file.read_text()}\n\n{block}")
    else:
        file.write_text(block)


@pytest.fixture(scope="module")
def followed(copy: Copy) -> Copy:
    """The copy after its documents were generated and the new page was written."""
    begun = copy.run("-m", "docs.generate")
    assert begun.returncode == 1
    assert begun.stderr == "docs/methods/halves.md says 'To be written.': write it.\n"
    page = copy.folder / "docs" / "methods" / "halves.md"
    page.write_text(page.read_text().replace("To be written.", "Written."))
    written = copy.run("-m", "docs.generate")
    assert (written.returncode, written.stdout, written.stderr) == (0, "", "")
    return copy


def test_the_page_can_be_followed_to_its_end(followed: Copy) -> None:
    require_passed(followed, OWN)
    listed = followed.run("-m", "api.cli", "methods")
    assert re.search(r"^halves +weight +rank 2r +Starts from half", listed.stdout, re.MULTILINE), listed.stdout


@pytest.mark.slow
def test_its_method_does_what_every_method_has_to_do(followed: Copy) -> None:
    files = [word for command in COMMAND.findall(PAGE) for word in command.split() if word.endswith(".py")]
    assert len(files) == 9
    files.remove("tests/lorainit/test_battery.py")  # it trains the method in dozens of combinations: a minute
    told = require_passed(followed, *files, "-k", "halves or initializations or registry or README.md")
    assert re.search(r"^\d{2,} passed", told, re.MULTILINE), told


def require_passed(copy: Copy, *asked: str) -> str:
    """What pytest says of these tests, none of which may fail or be skipped."""
    told = copy.run("-m", "pytest", "-p", "no:cacheprovider", "-q", *asked)
    assert told.returncode == 0, told.stdout
    assert "test_every_method" not in told.stdout  # nothing is listed that failed or was skipped
    return told.stdout


def test_the_spec_of_its_training_is_one(copy: Copy) -> None:
    ((path, spec),) = SPEC.findall(PAGE)
    assert f"-m lorainit {path} " in PAGE
    read = copy.run("-c", READ_SPEC, spec)
    assert (read.returncode, read.stderr) == (0, "")


def test_it_touches_as_many_files_as_contributing_says(copy: Copy) -> None:
    touched = {
        path.relative_to(copy.folder)
        for path in copy.folder.rglob("*.py")
        if not (ROOT / path.relative_to(copy.folder)).exists()
        or path.read_bytes() != (ROOT / path.relative_to(copy.folder)).read_bytes()
    }
    (told,) = re.findall(
        r"An initialization that looks at the weight touches (\d+) Python files", (ROOT / "CONTRIBUTING.md").read_text()
    )
    assert len(touched) == int(told), touched
