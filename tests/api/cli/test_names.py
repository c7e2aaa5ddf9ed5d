"""What the command line prints is what it was given: rich turns neither `:rocket:` nor brackets into something else."""

import ast
from pathlib import Path

import pytest
from openai.types.fine_tuning import FineTuningJob
from rich._emoji_codes import EMOJI
from typer.testing import CliRunner

import api
from api.cli import commands, tables
from api.cli.console import make_console
from lorainit.config.events import Message
from lorainit.progress import ProgressDisplay
from tests.api.cli.conftest import Served

NAMES = [f"ft:tiny:local:{code}:[bold]{number}" for number, code in enumerate(EMOJI)]
ROOT = Path(api.__file__).parents[1]


def seen(printed: str) -> list[str]:
    return [line.split()[-1] for line in printed.splitlines()]


@pytest.mark.parametrize("plainness", [{}, {"NO_COLOR": "1"}])
def test_every_shortcode_in_a_name_is_printed_as_it_is(
    plainness: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in plainness.items():
        monkeypatch.setenv(key, value)
    out = make_console()
    out.print("\n".join(NAMES))
    out.print(tables.make_table(("name", "result"), [(name, name) for name in NAMES]), soft_wrap=False)
    printed = capsys.readouterr().out
    assert len(NAMES) > 3000
    assert seen(printed) == [*NAMES, "result", *NAMES]


def test_every_shortcode_in_a_message_of_a_run_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    display = ProgressDisplay()
    for name in NAMES:
        display.show(Message(level="warn", message=name))
    assert seen(capsys.readouterr().err) == NAMES


def test_every_console_is_a_plain_one() -> None:
    makers = {"Console": {"api/cli/console.py", "lorainit/progress.py"}, "from_markup": set()}
    for path in [*(ROOT / "api").rglob("*.py"), *(ROOT / "lorainit").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func).rpartition(".")[2]) in makers:
                assert str(path.relative_to(ROOT)) in makers[name]
                assert {"emoji", "markup"} <= {word.arg for word in node.keywords}


def test_a_job_s_name_is_whole_in_its_row() -> None:
    job = FineTuningJob.model_construct(  # type: ignore[call-arg]
        id="ftjob-1", status="succeeded", model="tiny", fine_tuned_model=NAMES[0], error=None
    )
    assert tables.make_job_row(job)[-1] == NAMES[0]


def test_a_refusal_repeats_the_name_it_was_given(served: Served) -> None:
    for name in ("ftjob-:rocket:", ":boom:"):
        assert name in served.run("watch", name).stderr


@pytest.mark.parametrize(
    "options",
    [
        ["keys", "create", "--project", "x" * 5000],
        ["models", "inspect", "folder", "--id", "x" * 5000],
        ["models", "inspect", "folder", "--id", "tiny", "--root", "x" * 5000],
    ],
)
def test_a_name_that_is_too_long_is_not_repeated_whole(options: list[str]) -> None:
    done = CliRunner().invoke(commands.app, options)
    assert done.exit_code == 1
    assert "got 'xxx" in done.stderr and len(done.stderr) < 300
