"""The short run of `make chaos`, and the mutants that it must notice.

That its judge notices what is wrong: test_judge.py.
"""

import re
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
    # Jobs are shorter than in `make chaos`, so that those which are open at the end do not take longer than the chaos.
    code, said = chaos("--seed", "1", "--seconds", "20", "--kills", "15", "--real", "0", "--steps", "80", "130")
    assert code == 0, said
    assert "every promise was kept" in said
    # And there was something to keep them against.
    kills = sum(int(count) for count in re.findall(r"^  kill -9 of \w+ +(\d+)$", said, re.MULTILINE))
    (resumed,) = re.findall(r"^  resumed +(\d+)$", said, re.MULTILINE)
    assert kills >= 10 and int(resumed) > 0, said


@pytest.mark.slow
def test_with_a_bucket_and_sqlite_no_promise_is_broken_either() -> None:
    places = ("--storage", "bucket", "--database", "sqlite")
    code, said = chaos("--seed", "2", "--seconds", "60", "--kills", "30", "--real", "0", *places)
    assert code == 0, said
    assert "files in a bucket, rows in sqlite" in said
    assert "every promise was kept" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutant", "column"),
    [
        ("no-recovery", "stuck"),
        # A run that overlaps with its successor has to be seen at it, which a busy machine may miss.
        ("no-watchdog", "overlapping"),
        ("no-fence", "stale writes"),
        ("late-ack", "overlapping"),
        ("no-notification", "stuck"),
    ],
)
def test_chaos_notices_when_a_safeguard_is_missing(mutant: str, column: str) -> None:
    code, said = chaos("--mutant", mutant)
    assert code == 1, said
    assert f"! {column}: ftjob-" in said, said
