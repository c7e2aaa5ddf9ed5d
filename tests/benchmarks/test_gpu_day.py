"""`make gpu-day` on a processor with tiny shapes, so that it works on the day that a GPU is there."""

import argparse
import os
import subprocess
import sys
from importlib import import_module

import pytest

from benchmarks import gpu_day
from benchmarks.gpu.day import Day, held
from benchmarks.gpu_day import NO_GPU, SECTIONS, Section, end, outside, page, run
from tests.cli.conftest import gone

SECONDS = 100.0


@pytest.fixture
def day(tmp_path):
    return Day.begun("cpu", folder=tmp_path, tiny=True, seconds=SECONDS)


def cases():
    """The child starts whole processes, as tests/lorainit/test_main.py does."""
    slow = ("child", "options")
    return [pytest.param(s, id=s.name, marks=pytest.mark.slow if s.name in slow else ()) for s in SECTIONS]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("section", cases())
def test_every_section_finds_nothing_wrong_on_a_processor(day, capsys, section):
    module, function = section.where
    getattr(import_module(f"benchmarks.gpu.{module}"), function)(day)
    said = capsys.readouterr().out
    assert said.strip()
    assert "**" not in said


def test_a_case_that_fails_is_told_and_the_next_one_goes_on(day, capsys):
    day.attempt("first", lambda: [][0])
    day.attempt("second", lambda: held(False, "too far off"))
    first, second = capsys.readouterr().out.splitlines()
    assert "first: **IndexError: list index out of range** (not in the engine)" in first
    assert "second: **too far off**" in second


def test_a_section_that_is_late_says_what_it_left_out(day, capsys):
    day.until = 0.0
    day.attempt("third", lambda: "never")
    assert capsys.readouterr().out == "- third: not tried for lack of time\n"


GIVEN = argparse.Namespace(device="cpu", tiny=True)


def test_a_section_has_a_process_of_its_own(tmp_path):
    assert "processor cores" in run(SECTIONS[0], GIVEN, tmp_path)


def test_a_process_that_dies_is_told_in_bold(tmp_path):
    gone = Section("gone", "Gone", ("kernels", "gone"), 60)
    assert run(gone, GIVEN, tmp_path).startswith("**it ended with exit code 1: ")


def test_a_process_that_hangs_is_ended(tmp_path):
    hurried = Section("machine", "The machine", ("kernels", "machine"), 0.01)
    assert run(hurried, GIVEN, tmp_path) == "**it did not end in 0.01 s**"


def test_what_a_hanging_process_started_is_ended_with_it():
    """It would keep the GPU from what is timed after it."""
    started = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    command = [sys.executable, "-uc", f"{started}; print(child.pid); child.wait()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        end(process)
    assert gone([process.pid, child], seconds=20)


def test_a_process_that_a_signal_ends_is_told_and_the_next_section_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "run_for", lambda _, command, **more: -11 if "first" in command else 0)
    both = [Section(name, name, ("kernels", "machine"), 60) for name in ("first", "second")]
    found = {section.name: text for section, text in outside(both, GIVEN, tmp_path)}
    assert found == {"first": "**it ended with exit code -11: it said nothing**", "second": ""}


def test_without_a_gpu_nothing_is_run_and_the_page_stays(tmp_path):
    page_of_before = tmp_path / "page.md"
    page_of_before.write_text("Nothing was measured on a GPU yet.")
    command = [sys.executable, gpu_day.__file__, "--write", page_of_before]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == NO_GPU
    assert "`lorainit doctor` says why" in done.stdout
    assert page_of_before.read_text() == "Nothing was measured on a GPU yet."


def test_a_page_names_the_sections_that_were_not_run():
    text = page({"machine": "- no GPU"}, GIVEN)
    assert text.count("Not run.") == len(SECTIONS) - 1


def test_a_page_of_a_processor_says_so():
    text = page({"machine": "- no GPU"}, GIVEN)
    assert "Nothing was measured on a GPU: this run was on a processor" in text
    assert "## The machine\n\n- no GPU" in text
