"""Commands whose reader has left, as in `lorainit list | head -1`: no word, exit code 141, nothing left behind."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.api.cli.conftest import Served, environment

CLOSED = 141
API, ENGINE = (sys.executable, "-m", "api.cli"), (sys.executable, "-m", "lorainit")


@pytest.fixture
def nobody() -> Iterator[int]:
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def run(*command: str, out: int, err: int = subprocess.PIPE, **more: str) -> subprocess.CompletedProcess[str]:
    env = environment(PYTHONUNBUFFERED="", **more)
    return subprocess.run(command, stdout=out, stderr=err, env=env, text=True, check=False, timeout=900)


def at_server(served: Served, *arguments: str, out: int, err: int = subprocess.PIPE) -> tuple[int, str]:
    done = run(*API, *arguments, out=out, err=err, OPENAI_BASE_URL=served.url, OPENAI_API_KEY=served.key)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", [(*API, "--help"), (*API, "migrate", "--check"), (*ENGINE, "--help")])
def test_what_needs_no_server_ends_quietly(nobody: int, command: tuple[str, ...]) -> None:
    done = run(*command, out=nobody)
    assert (done.returncode, done.stderr) == (CLOSED, "")


@pytest.mark.slow  # the command that `list` and `migrate` end as well
def test_doctor_ends_quietly(nobody: int, tmp_path: Path) -> None:
    done = run(*API, "doctor", "--state", str(tmp_path / "none"), out=nobody)
    assert (done.returncode, done.stderr) == (CLOSED, "")


@pytest.mark.slow  # the program whose help and whose refusal do so
def test_doctor_of_a_run_ends_quietly(nobody: int) -> None:
    done = run(*ENGINE, "doctor", out=nobody)
    assert (done.returncode, done.stderr) == (CLOSED, "")


@pytest.mark.slow  # the program whose other command is the doctor
def test_facts_of_a_base_end_quietly(nobody: int, tiny: Path) -> None:
    done = run(*ENGINE, "inspect", str(tiny), out=nobody)
    assert (done.returncode, done.stderr) == (CLOSED, "")


@pytest.mark.parametrize(
    "command", ["list", *(pytest.param(it, marks=pytest.mark.slow) for it in ("models list", "methods"))]
)
def test_what_a_server_is_asked_ends_quietly(served: Served, nobody: int, command: str) -> None:
    assert at_server(served, *command.split(), out=nobody) == (CLOSED, "")


@pytest.mark.slow  # the program whose `migrate` does so
def test_keys_end_quietly(served: Served, nobody: int) -> None:
    assert at_server(served, "keys", "list", "--state", str(served.state), out=nobody) == (CLOSED, "")


def test_what_is_said_on_standard_error_ends_quietly(served: Served, nobody: int) -> None:
    """As in `lorainit watch JOB 2>&1 | head -1`; here the line is that there is no such job."""
    code, _ = at_server(served, "watch", "ftjob-none", out=nobody, err=nobody)
    assert code == CLOSED


def test_a_service_whose_reader_has_left_ends_whole(nobody: int, tmp_path: Path) -> None:
    done = run(*API, "serve", "--state", str(tmp_path / "state"), "--port", "0", out=nobody)
    assert done.returncode == CLOSED
    assert "Traceback" not in done.stderr
    assert not [
        one.pid for one in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(one.info["cmdline"] or ())
    ]


def test_a_refused_spec_of_which_nobody_reads_the_fault_ends_as_quietly(nobody: int, tmp_path: Path) -> None:
    done = run(*ENGINE, str(tmp_path / "none.json"), str(tmp_path / "out"), out=nobody, err=nobody)
    assert done.returncode == CLOSED
