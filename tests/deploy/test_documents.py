"""README and docs say what is there: settings, initializations, commands, files, modules, rows. What is generated is
held by `test_generated.py`."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main

from api.cli import app
from api.core.settings import Settings
from api.schemas.job_request import JobRequest
from lorainit.config.inits import INITS
from lorainit.config.rates import RATES
from lorainit.config.spec import RunSpec
from lorainit.data.formats.conversation import find_faults
from lorainit.data.formats.rows import kind_of
from tests.deploy.test_generated import read

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)


def test_the_readmes_first_settings_are_settings_with_their_defaults() -> None:
    rows = re.findall(r"^\| `(LORAINIT_[A-Z0-9_]+)` \| (.*?) \| .+ \|$", README, re.MULTILINE)
    fields = {f"LORAINIT_{name.upper()}": field.default for name, field in Settings.model_fields.items()}
    assert len(rows) > 3
    assert rows == [(name, "" if fields[name] is None else f"`{fields[name]}`") for name, _ in rows]


@pytest.mark.parametrize("name", INITS)
def test_every_method_has_a_page_with_its_facts_and_parameters(name: str) -> None:
    kind = INITS[name]
    page = read(f"docs/methods/{name}.md")
    assert page.startswith(f"# {kind.facts.title}\n")
    for part in (
        "**When to use it.**",
        "**Cost.**",
        "**Learning rate.**",
        "## Parameters",
        "## Source",
        "## Not verified",
    ):
        assert part in page
    if kind.facts.arxiv:
        assert f"https://arxiv.org/abs/{kind.facts.arxiv}" in page
    documented = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \| .+ \|$", page, re.MULTILINE))
    fields = {field: info.default for field, info in kind.model_fields.items() if field not in ("method", "seed")}
    assert {field: json.loads(value) for field, value in documented.items()} == fields


@pytest.mark.parametrize("name", INITS)
def test_numbers_of_rates_in_the_text_of_a_methods_page_are_the_tables(name: str) -> None:
    page = read(f"docs/methods/{name}.md")
    (said,) = re.findall(r"^\*\*Learning rate\.\*\* (.+)$", page, re.MULTILINE)
    numbers = {float(number) for number in re.findall(r"\b[\d.]+e-\d+\b|\b0\.000?\d+\b", said)}
    assert numbers <= {rate.value for other, row in RATES.items() if other.split()[0] == name for rate in row}


def test_the_list_of_methods_is_the_registry() -> None:
    index = (ROOT / "docs" / "methods" / "README.md").read_text()
    assert re.findall(r"^\| \[`(\w+)`\]", index, re.MULTILINE) == list(INITS)
    pages = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert pages == {*INITS, "README", "benchmark"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_headings_lead_to_one(page: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert heading in headings(page.parent / target if target else page), f"{target}#{heading}"


def headings(page: Path) -> set[str]:
    """The anchors of a page: those of its headings, as GitHub makes them, and those that it names itself."""
    text = page.read_text()
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles} | set(
        re.findall(r'<a id="([^"]+)">', text)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_named_exist(page: Path) -> None:
    text = page.read_text()
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(re.findall(r"(?:`|^ {0,4}|exec api )lorainit (\w+)", text, re.MULTILINE)) <= set(commands)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z-]+)`", text)) <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:api|worker|lorainit|migrations|tests|docs|examples|benchmarks)/[\w./-]+)`", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_example_rows_are_what_the_generator_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "examples" / "make_data.py"), str(tmp_path)], check=True)
    for name in ("train.jsonl", "validation.jsonl"):
        assert (ROOT / "examples" / name).read_text() == (tmp_path / name).read_text()


def test_every_decision_has_a_number_of_its_own_and_stands_in_the_list() -> None:
    folder = ROOT / "docs" / "decisions"
    pages = sorted(page.name for page in folder.glob("[0-9]*.md"))
    assert re.findall(r"^\| \[\d{4}\]\(([^)]+)\)", (folder / "README.md").read_text(), re.MULTILINE) == pages
    assert len({name[:4] for name in pages}) == len(pages)


def test_ci_runs_the_readmes_test_command() -> None:
    assert "exec make test\n" in (ROOT / ".ci" / "run").read_text()
    assert "`make test`" in README


def test_the_index_has_every_page() -> None:
    folder = ROOT / "docs"
    linked = {(folder / target).resolve() for target in re.findall(r"\]\(([^)#]+)", (folder / "README.md").read_text())}
    pages = {*folder.glob("*.md"), folder / "methods" / "README.md", folder / "decisions" / "README.md"}
    assert sorted(str(page.relative_to(ROOT)) for page in pages - linked - {folder / "README.md"}) == []


SOURCES = sorted(path for name in ("api", "worker", "lorainit", "docs") for path in (ROOT / name).rglob("*.py"))


def test_modules_named_in_words_exist() -> None:
    """`lorainit.config.spec.RunSpec` in a docstring or a page: the longest part of it that is a module, and a word in
    that.
    """
    texts = {path: path.read_text() for path in (*SOURCES, *PAGES) if path.name not in ("CHANGELOG.md", "log.md")}
    named = {
        (path, name)
        for path, text in texts.items()
        if "decisions" not in path.parts
        for name in re.findall(r"`((?:api|worker|lorainit)(?:\.\w+)+)`", text)
    }
    assert len(named) > 50
    assert sorted(f"{path.relative_to(ROOT)}: {name}" for path, name in named if not leads_somewhere(name)) == []


def leads_somewhere(name: str) -> bool:
    """Whether a dotted name is a module of ours, or something that is named in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        module = next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.exists()), None)
        if module is not None:
            return all(re.search(rf"\b{word}\b", module.read_text()) for word in parts[length:])
    return False


def test_the_example_spec_is_a_run_on_the_built_in_base_and_on_files_that_are_there() -> None:
    spec = RunSpec.model_validate_json((ROOT / "examples" / "spec.json").read_bytes())
    built_in = tomllib.loads((ROOT / "api" / "core" / "models" / "catalogue.toml").read_text())["models"][0]
    assert (spec.model.id, spec.model.source, spec.model.root) == (built_in["id"], built_in["source"], built_in["root"])
    assert spec.data.validation is not None
    assert all((ROOT / file).exists() for file in (spec.data.training, spec.data.validation))
    package, _, file = spec.model.source.removeprefix("package:").partition("/")
    quickstart = (ROOT / "docs" / "quickstart.md").read_text()
    assert f'find_spec("{package}")' in quickstart
    assert f'gguf_file="{file}"' in quickstart


@pytest.mark.parametrize("page", ["your-data", "grouped"])
def test_json_in_the_guides_is_what_the_api_takes(page: str) -> None:
    """A row of training data, or part of an order: never a field that does not exist."""
    blocks = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL)
    assert blocks
    for block in map(json.loads, blocks):
        if kind_of(block):
            assert list(find_faults(block, kind_of(block) or "chat")) == []
        else:
            JobRequest.model_validate({"model": "base", "training_file": "file-1", **block})
