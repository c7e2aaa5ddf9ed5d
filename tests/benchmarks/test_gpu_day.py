"""`make gpu-day` on a processor with tiny shapes, so that it works on the day that a GPU is there."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pytest

from benchmarks import gpu_day
from benchmarks.gpu import outside as gpu_day_outside
from benchmarks.gpu import rivals, speed
from benchmarks.gpu.day import Day, held
from benchmarks.gpu.outside import AGAIN, Asked, end, environment, outside, run, watched
from benchmarks.gpu.plan import (
    BUDGET,
    HELD,
    NO_GPU,
    NOT_ALL_TRIED,
    SECTIONS,
    WRONG,
    Clock,
    Section,
    exit_code,
    waves,
)
from benchmarks.gpu_day import page
from tests.api.cli.conftest import gone

SECONDS = 100.0


@pytest.fixture
def day(tmp_path):
    return Day.begun("cpu", folder=tmp_path, tiny=True, seconds=SECONDS)


def cases():
    """The child starts whole processes, as tests/lorainit/test_main.py does; `jobs-gpt2` is `jobs-llama` on a base that
    tests/lorainit trains throughout.
    """
    slow = ("child", "options", "jobs-gpt2")
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


def test_a_line_begins_when_its_case_does_and_is_kept_by_what_ends_it(day, capsys):
    def work():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        day.attempt("first", work)
    assert capsys.readouterr().out == "- first: "


def test_cases_that_another_process_began_are_not_tried_again(day, capsys):
    day.attempt("first", lambda: "")
    capsys.readouterr()
    later = Day.begun("cpu", folder=day.folder, tiny=True, seconds=SECONDS)
    later.attempt("first", lambda: "again")
    later.attempt("second", lambda: "once")
    assert capsys.readouterr().out.startswith("- second: once")


def test_a_gpu_that_no_longer_answers_its_process_sends_the_rest_to_another(day):
    def work():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(SystemExit) as ended:
        day.attempt("first", work)
    assert ended.value.code == AGAIN


def test_a_trainer_that_cannot_be_loaded_is_told_as_not_installed(day, capsys, monkeypatch):
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    speed.steps(day)
    said = capsys.readouterr().out
    assert "HF Trainer was not measured: accelerate, which it needs, is not installed." in said
    assert "| HF Trainer" not in said
    assert "**" not in said


# --- Unsloth, pretended ----------------------------------------------------------------------------

FAILS = "raise NotImplementedError('Unsloth cannot find any torch accelerator')"
WORKS = """
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


class FastLanguageModel:
    @staticmethod
    def from_pretrained(name, max_seq_length, dtype, load_in_4bit):
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), None

    @staticmethod
    def get_peft_model(model, use_gradient_checkpointing, **asked):
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **asked))
"""


def pretend_unsloth(folder, monkeypatch, text):
    (folder / "unsloth.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_an_unsloth_that_fails_is_told_with_its_last_line_and_nothing_is_wrong(day, capsys, tmp_path, monkeypatch):
    pretend_unsloth(tmp_path, monkeypatch, FAILS)
    rivals.unsloth(day)
    said = capsys.readouterr().out
    assert "Unsloth failed with exit code 1: NotImplementedError: Unsloth cannot find any torch accelerator" in said
    assert "**" not in said


@pytest.mark.slow
def test_an_unsloth_that_works_is_measured_in_a_process_of_its_own(day, capsys, tmp_path, monkeypatch):
    pretend_unsloth(tmp_path, monkeypatch, WORKS)
    rivals.unsloth(day)
    assert re.search(r"^\| tiny \| 4 × 64 \| Unsloth \| [\d.]+ \| [\d,]+ \|", capsys.readouterr().out, re.MULTILINE)


# --- the plan --------------------------------------------------------------------------------------


def some(name, seconds=60.0, **more):
    return Section(name, name.title(), "what it shows", ("kernels", "machine"), seconds, **more)


class Time:
    """A clock that only goes on when it is told to."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def taken(share):
    """What every section of the plan is given, one after the other, if each takes this share of it."""
    now = Time()
    clock, given = Clock(now=now), []
    for section in SECTIONS:
        given.append(clock.given(section))
        now.seconds += share * given[-1]
    return given


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_what_is_begun_never_takes_more_than_ten_minutes(share):
    assert sum(share * seconds for seconds in taken(share)) <= BUDGET == 600


def test_sections_that_take_all_they_may_leave_none_for_the_last():
    assert taken(1.0)[0] == SECTIONS[0].seconds
    assert taken(1.0)[-1] == 0


def test_sections_that_end_early_leave_enough_for_all():
    assert taken(0.5) == [section.seconds for section in SECTIONS]


def test_with_cores_enough_every_section_may_take_all_it_may():
    assert sum(max(section.seconds for section in wave) for wave in waves(SECTIONS)) <= BUDGET


def test_a_section_is_given_what_is_left_and_nothing_if_that_is_too_little():
    now = Time()
    clock = Clock(100, now=now)
    assert clock.given(some("long", 90)) == 90
    now.seconds = 80
    assert clock.given(some("long", 90)) == 20
    now.seconds = 90
    assert clock.given(some("long", 90)) == 0


def test_what_is_timed_runs_alone_and_what_checks_side_by_side():
    sections = [some("a", alone=True), some("b"), some("c"), some("d", alone=True), some("e", alone=True)]
    assert [[one.name for one in wave] for wave in waves(sections)] == [["a"], ["b", "c"], ["d"], ["e"]]


BOTH = [some("first"), some("second")]


@pytest.mark.parametrize(
    ("texts", "code"),
    [
        ({"first": "- well", "second": "- well"}, HELD),
        ({"first": "- **wrong**", "second": "- not tried: no package"}, WRONG),
        ({"first": "- well"}, NOT_ALL_TRIED),
        ({"first": "- well", "second": "- case: not tried for lack of time"}, NOT_ALL_TRIED),
    ],
)
def test_the_exit_code_says_what_was_wrong_or_else_what_was_not_tried(texts, code):
    assert exit_code(BOTH, texts) == code


# --- sections from outside -------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path):
    return Asked("cpu", tiny=True, folder=tmp_path)


@pytest.fixture
def scripts(monkeypatch):
    """Sections that are small programs instead: their texts, one for each process of the section."""
    texts = []
    head = "import os, sys, time\ndef say(text): sys.stdout.write(text); sys.stdout.flush()\n"

    def command(section, asked, *, seconds):
        return [sys.executable, "-c", head + texts.pop(0)]

    monkeypatch.setattr(gpu_day_outside, "command", command)
    return texts


def test_a_section_has_a_process_of_its_own(asked):
    patient = replace(SECTIONS[0], each=600)
    assert "processor cores" in run(patient, asked, seconds=600)


HOW = {98: "late", 99: "hangs"}


@pytest.fixture
def ended(monkeypatch):
    """What ends with one of these exit codes is taken for what was late, or hung: no test waits for a clock."""

    def watched(what, page, *, until, each, **more):
        code = subprocess.run(what, **more, check=False).returncode
        return HOW.get(code, code)

    monkeypatch.setattr(gpu_day_outside, "watched", watched)


def test_a_case_that_hangs_loses_its_own_line_only(asked, scripts, ended):
    scripts += ["say('- first: well\\n- second: '); sys.exit(99)", "say('- third: well\\n')"]
    found = run(some("machine", each=9), asked, seconds=600)
    assert found == "- first: well\n- second: **it did not end in 9 s**\n- third: well"


def test_what_does_not_end_in_its_seconds_was_not_tried_to_its_end_and_is_not_called_wrong(asked, scripts, ended):
    scripts += ["say('- first: '); time.sleep(0.1); sys.exit(98)"]
    assert run(some("machine"), asked, seconds=0.1) == "- first: not tried to its end: 0 s were over"


ASLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def test_a_process_whose_page_does_not_grow_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day_outside, "LOADING", 0)
    page = tmp_path / "page.md"
    page.touch()
    assert watched(ASLEEP, page, until=math.inf, each=0.1) == "hangs"


def test_a_process_is_ended_when_its_time_is_over(tmp_path):
    page = tmp_path / "page.md"
    page.touch()
    assert watched(ASLEEP, page, until=0.0, each=600) == "late"


@pytest.mark.parametrize(
    ("ends", "how"),
    [
        ("os.kill(os.getpid(), 11)", "**its process ended with exit code -11: it said nothing**"),
        ("raise ValueError('no such kernel')", "**its process ended with exit code 1: ValueError: no such kernel**"),
    ],
)
def test_a_case_that_ends_its_process_loses_its_own_line_only(asked, scripts, ends, how):
    scripts += [f"say('- first: '); {ends}", "say('- second: well\\n')"]
    assert run(some("machine"), asked, seconds=600) == f"- first: {how}\n- second: well"


def test_a_process_whose_gpu_is_lost_is_followed_by_another(asked, scripts):
    scripts += [f"say('- first: **lost**\\n'); sys.exit({AGAIN})", "say('- second: well\\n')"]
    assert run(some("machine"), asked, seconds=600) == "- first: **lost**\n- second: well"


def test_a_process_that_dies_between_its_cases_is_not_followed_by_another(asked, scripts):
    scripts += ["say('- first: well\\n'); sys.exit(3)", "say('never')"]
    text = run(some("machine"), asked, seconds=600)
    assert text == "- first: well\n\n**its process ended with exit code 3: it said nothing**"


def test_what_a_hanging_process_started_is_ended_with_it():
    """It would keep the GPU from what is timed after it."""
    started = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    command = [sys.executable, "-uc", f"{started}; print(child.pid); child.wait()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        end(process)
    assert gone([process.pid, child], seconds=20)


def test_sections_come_in_the_order_of_the_plan_and_those_for_which_no_time_is_left_do_not(asked, scripts):
    scripts += ["say('- well\\n')"] * 2
    now = Time()
    clock = Clock(now=now)
    found = outside([some("first", alone=True), some("second", alone=True), some("third", alone=True)], asked, clock)
    names = [next(found)[0].name, next(found)[0].name]
    now.seconds = BUDGET
    assert [*names, *(section.name for section, _ in found)] == ["first", "second"]


def test_of_several_gpus_a_section_sees_the_first_unless_it_is_for_all(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    asked = Asked("cuda", tiny=False, folder=tmp_path)
    assert environment(some("one"), asked)["CUDA_VISIBLE_DEVICES"] == "2"
    assert environment(some("all", all_gpus=True), asked)["CUDA_VISIBLE_DEVICES"] == "2,3"


# --- command and page ------------------------------------------------------------------------------


def test_without_a_gpu_nothing_is_run_and_the_page_stays(tmp_path):
    page_of_before = tmp_path / "page.md"
    page_of_before.write_text("Nothing was measured on a GPU yet.")
    command = [sys.executable, gpu_day.__file__, "--write", page_of_before]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == NO_GPU
    assert "`lorainit doctor` says why" in done.stdout
    assert page_of_before.read_text() == "Nothing was measured on a GPU yet."


def test_a_page_lists_first_what_did_not_hold_and_what_was_not_tried():
    text = page({"machine": "- no GPU", "resume": "- AdamW: **far off**"}, "cpu")
    said = text[: text.index("\n## ")]
    assert "Something did not hold in: resume." in said
    assert "Not tried, or not to the end: attention, dead-zone, memory, cases, steps," in said
    assert text.count("Not tried.") == len(SECTIONS) - 2


def test_a_page_of_a_processor_says_so():
    text = page({"machine": "- no GPU"}, "cpu")
    assert "Nothing was measured on a GPU: this run was on a processor" in text
    assert f"## The machine\n\n*{SECTIONS[0].shows}*\n\n- no GPU" in text


def test_the_pages_table_of_sections_is_the_plan():
    table = (gpu_day.ROOT / "docs/speed-gpu.md").read_text().partition("| section |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([\w-]+) \| (.*) \|$", table, re.MULTILINE)
    assert rows == [(section.name, section.shows) for section in SECTIONS]


def test_a_driver_that_hangs_is_no_gpu_and_is_told(monkeypatch, capsys):
    monkeypatch.setattr(gpu_day, "run_command", lambda *_, **__: None)
    assert not gpu_day.has_gpu()
    assert "its driver may hang" in capsys.readouterr().out


def test_a_part_is_not_written_over_the_whole_page(monkeypatch, capsys, tmp_path):
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["gpu_day.py", "--only", SECTIONS[0].name, "--write", str(page)])
    with pytest.raises(SystemExit):
        gpu_day.main()
    assert "leave one out" in capsys.readouterr().err
