"""The short run of `make chaos`, and a mutant that it must notice."""

import subprocess
import sys

import pytest

from tests.chaos.fleet import ROOT


def chaos(*options: str) -> tuple[int, str]:
    """The exit code and what was printed."""
    command = [sys.executable, "-m", "tests.chaos", *options]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout + ran.stderr


def test_half_a_minute_of_chaos_breaks_no_promise() -> None:
    code, said = chaos("--seed", "1", "--seconds", "30", "--kills", "20", "--real", "0")
    assert code == 0, said
    assert "every promise was kept" in said


@pytest.mark.parametrize(
    ("mutant", "options", "column"),
    [
        ("no-recovery", ("--only", "supervisor", "--kills", "8"), "stuck"),
        pytest.param("no-fence", ("--only", "supervisor", "--kills", "0"), "stale writes", marks=pytest.mark.slow),
        pytest.param("no-watchdog", ("--only", "supervisor", "--kills", "0"), "overlapping", marks=pytest.mark.slow),
        pytest.param("late-ack", ("--only", "doorbells", "--kills", "0"), "overlapping", marks=pytest.mark.slow),
        pytest.param("no-ring", ("--only", "wiped", "--kills", "0"), "stuck", marks=pytest.mark.slow),
    ],
)
def test_chaos_notices_when_a_safeguard_is_missing(mutant: str, options: tuple[str, ...], column: str) -> None:
    # One user leaves a slot free, so that a frozen supervisor's job has a successor before it thaws.
    short = ("--seconds", "25", "--settle", "15", "--real", "0", "--users", "1", "--fickle", "0")
    code, said = chaos("--mutant", mutant, *short, *options)
    assert code == 1, said
    assert f"! {column}: ftjob-" in said, said
