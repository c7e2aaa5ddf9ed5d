"""README and docs say what is there: settings, initializations, commands, files, rows."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from api.cli import app
from api.core.settings import Settings
from benchmarks import rates_page
from lorainit.inits import INITS
from lorainit.rates import RATES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)


def section(title: str) -> str:
    """The text below a heading, up to the next one of its level."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_every_setting_is_documented_with_its_default_and_nothing_else_is() -> None:
    rows = re.findall(r"^\| `(LORAINIT_[A-Z0-9_]+)` \| (.*?) \| (.*) \|$", section("Configuration"), re.MULTILINE)
    documented = {name: (default.strip("`"), text) for name, default, text in rows}
    expected = {
        f"LORAINIT_{name.upper()}": ("" if field.default is None else str(field.default), field.description)
        for name, field in Settings.model_fields.items()
    }
    assert documented == expected


def test_the_table_of_initializations_is_the_registry() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|", section("Initializations"), re.MULTILINE)
    expected = []
    for name, model in INITS.items():
        facts, default = model.facts, model.model_validate({"method": name})
        paper = f"[{facts.title}](https://arxiv.org/abs/{facts.arxiv})" if facts.arxiv else facts.title
        expected.append((name, paper, facts.description, default.export_rank))
    assert rows == expected


@pytest.mark.parametrize("name", INITS)
def test_the_readme_names_every_parameter_of_a_method(name: str) -> None:
    (row,) = re.findall(rf"^\| `{name}` \|.*\| (.*?) \|$", section("Initializations"), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == set(INITS[name].model_fields) - {"method", "seed"}


@pytest.mark.parametrize("name", INITS)
def test_every_method_has_a_page_with_its_facts_and_parameters(name: str) -> None:
    kind, default = INITS[name], INITS[name].model_validate({"method": name})
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
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
    (told,) = re.findall(rf"^\| {kind.facts.needs} \| (.*) \| (.*) \| (.*) \| (\w+) \|$", page, re.MULTILINE)
    assert told[0].startswith("the base model") == default.function_preserving
    assert told[1].startswith("yes" if default.offset == "subtract" else "no")
    assert told[2].startswith(default.export_rank)
    assert told[3] == kind.facts.maturity
    documented = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \| .+ \|$", page, re.MULTILINE))
    fields = {field: info.default for field, info in kind.model_fields.items() if field not in ("method", "seed")}
    assert {field: json.loads(value) for field, value in documented.items()} == fields


def test_the_table_of_learning_rates_is_the_codes() -> None:
    page = (ROOT / "docs" / "rates.md").read_text()
    assert page.partition("<!-- rates -->\n")[2].partition("<!-- /rates -->")[0].strip() == rates_page.table(), (
        "python benchmarks/bench_rates.py --table --write docs/rates.md"
    )


@pytest.mark.parametrize("name", RATES)
def test_a_methods_page_says_its_default_learning_rates(name: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{name.partition(' ')[0]}.md").read_text()
    (said,) = re.findall(r"^\*\*Learning rate\.\*\* (.*)$", page, re.MULTILINE)
    assert rates_page.by_size(RATES[name]) in said
    numbers = {float(number) for number in re.findall(r"\b[\d.]+e-\d+\b|\b0\.000?\d+\b", said)}
    assert numbers <= {
        rate.value for other, row in RATES.items() if other.split()[0] == name.split()[0] for rate in row
    }


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
    assert "make test " in README
