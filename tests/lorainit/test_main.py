"""The command line, in a process of its own: what a person and what the worker start."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from lorainit.__main__ import main
from lorainit.config.events import EVENT, Checkpoint, Done, Failed, Metrics, Stage
from lorainit.config.spec import RunSpec
from lorainit.config.validation_errors import describe_errors
from lorainit.model import sandbox
from tests.lorainit.forked import Forked

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


@pytest.fixture
def child(spec, tmp_path):
    """Start `python -m lorainit` on a spec; returns (process, read end of its events or None)."""
    started = []

    def start(*options, events=False, from_scratch=False, raw=None, errors=None, **overrides):
        path = tmp_path / "spec.json"
        path.write_text(raw if raw is not None else spec(**overrides).model_dump_json())
        arguments = [str(path), str(tmp_path / "out"), *options]
        reader, writer = os.pipe() if events else (None, None)
        if from_scratch:
            process = subprocess.Popen(
                [sys.executable, "-m", "lorainit", *arguments], stderr=-1, text=True, env=ENVIRONMENT
            )
        else:
            process = Forked(arguments, events=writer, errors=errors, env=ENVIRONMENT)
        if events:
            os.close(writer)
        started.append(process)
        return process, os.fdopen(reader) if events else None

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_person_gets_a_picture_and_the_adapters_place(child, tmp_path):
    process, _ = child(from_scratch=True)
    _, shown = process.communicate(timeout=600)
    assert process.returncode == 0, shown
    assert f"Adapter: {tmp_path / 'out' / 'adapter'}" in shown
    assert "Initialized 14 modules with loram" in shown
    assert "on the untouched base" in shown
    assert "Traceback" not in shown
    assert "Loading weights" not in shown
    assert "pip install kernels" not in shown  # bitsandbytes, on some CPUs


def test_a_person_who_reads_no_more_ends_the_run_quietly(child):
    """As in `python -m lorainit spec.json out 2>&1 | head -1`; the exit code is that of other tools in a pipe."""
    reader, writer = os.pipe()
    process, _ = child(training={"max_steps": 2000}, errors=writer)
    os.close(writer)
    with os.fdopen(reader) as errors:
        errors.readline()
    assert process.wait(timeout=600) == 141


def test_worker_gets_events_as_lines(child):
    process, stream = child(events=True)
    with stream:
        events = [EVENT.validate_json(line) for line in stream]
    out, errors = process.communicate(timeout=600)
    assert (process.returncode, out) == (0, ""), errors
    assert isinstance(events[-1], Done)


TOO_LARGE = {"r": 17, "target_modules": ["k_proj"]}


def test_failure_is_an_event_and_code_1_and_nothing_that_is_logged(child):
    process, stream = child(events=True, lora=TOO_LARGE)
    with stream:
        last = [EVENT.validate_json(line) for line in stream][-1]
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert last == Failed(code="rank_too_large", message=last.message, param="lora.r")
    assert errors == ""  # the supervisor logs it, and what a run says may quote rows


def test_a_person_reads_a_failure_as_one_line(child):
    process, _ = child(lora=TOO_LARGE)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert [line for line in errors.splitlines() if line.startswith("rank_too_large: ")]


def test_failure_nobody_foresaw_is_internal_and_says_nothing_to_the_client(child, tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    process, stream = child(events=True)
    with stream:
        last = [EVENT.validate_json(line) for line in stream][-1]
    _, errors = process.communicate(timeout=600)
    assert (process.returncode, last.code) == (1, "internal_error")
    assert str(tmp_path) not in last.message
    assert "Traceback" in errors


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("{", "Invalid JSON"),
        (
            '{"model": {"id": "x", "source": "x", "root": "local:x"}, "data": {"training": "x"}, "epochs": 3}',
            "epochs: Extra",
        ),
        (
            '{"model": {"id": "x", "source": "x", "root": "local:x"}, "data": {"training": "x"},'
            ' "lora": {"init": "loram", "r": 1}}',
            "lora.r: loram needs a rank of at least 2",
        ),
        (
            '{"model": {"id": "x", "source": "./tiny", "root": "tiny"}, "data": {"training": "x"}}',
            "model.root: 'tiny' is no hub id (OWNER/NAME)",  # whoever owns that name there
        ),
    ],
)
def test_wrong_spec_names_the_field(child, raw, text):
    process, _ = child(raw=raw)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2
    assert text in errors
    assert "Traceback" not in errors


def read_until(stream, kind):
    for line in stream:
        event = EVENT.validate_json(line)
        if isinstance(event, kind):
            return event
    raise AssertionError(f"no {kind.__name__} came")


LONG = {"training": {"max_steps": 100_000, "checkpoint_interval": 100_000, "batch_size": 5}}


def test_sigterm_stops_at_the_next_event_without_a_traceback(child):
    process, stream = child(events=True, **LONG)
    with stream:
        while read_until(stream, Stage).stage != "training":
            pass
        process.send_signal(signal.SIGTERM)
        kinds = {json.loads(line)["kind"] for line in stream}
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 143
    assert errors == ""
    assert "failed" not in kinds


def test_sigterm_leaves_a_checkpoint_of_the_steps_taken(child):
    process, stream = child(events=True, **LONG)
    with stream:
        read_until(stream, Metrics)
        process.send_signal(signal.SIGTERM)
        rest = [EVENT.validate_json(line) for line in stream]
    process.communicate(timeout=600)
    last = rest[-1]
    assert isinstance(last, Checkpoint)
    assert last.step == max([1, *(event.step for event in rest if isinstance(event, Metrics))])
    assert (Path(last.path) / "state.safetensors").exists()


def test_run_leaves_when_its_lease_is_past(child, tmp_path):
    lease = tmp_path / "lease"
    lease.write_text(str(time.monotonic() + 300))
    process, stream = child("--lease", str(lease), events=True, **LONG)
    with stream:
        while read_until(stream, Stage).stage != "training":
            pass
        assert process.poll() is None
        lease.write_text(str(time.monotonic() - 1))
        stream.read()
    assert process.wait(timeout=600) == 75


def test_lease_that_is_past_stops_the_run_even_while_it_loads(child, tmp_path):
    lease = tmp_path / "lease"
    lease.write_text("0")
    process, _ = child("--lease", str(lease), from_scratch=True)
    assert process.wait(timeout=600) == 75
    assert not (tmp_path / "out").exists()


PARENT = """
import os, subprocess, sys, warnings
warnings.simplefilter("default")
*arguments, named = sys.argv[1:]
# Its events go where errors go, which is a file: no pipe that breaks ends it.
command = [sys.executable, "-m", "lorainit", *arguments, "--events-fd", "2"]
child = subprocess.Popen(command, env=dict(os.environ))
with open(named, "w") as file:
    file.write(str(child.pid))
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_child_dies_with_its_supervisor(spec, tmp_path):
    path, log, named = tmp_path / "spec.json", tmp_path / "out" / "metrics.jsonl", tmp_path / "child"
    path.write_text(spec(**LONG).model_dump_json())
    parent = Forked([path, tmp_path / "out", named], code=PARENT, env=ENVIRONMENT)
    wait_for(lambda: parent.poll() is not None or log.exists())
    assert parent.poll() is None, parent.communicate()[1]
    pid = int(named.read_text())
    try:
        assert alive(pid)
        parent.kill()
        parent.communicate()
        wait_for(lambda: not alive(pid))
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def wait_for(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "that did not happen"
        time.sleep(0.05)


def alive(pid):
    """Running, not merely waiting to be buried by init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_inspect_prints_json(bases, tmp_path):
    command = [sys.executable, "-m", "lorainit", "inspect", str(bases["llama"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    facts = json.loads(done.stdout)
    assert (facts["root"], facts["max_length"], facts["chat"]) == ("local:llama", 256, True)
    assert [t["name"] for t in facts["targets"]][:2] == ["q_proj", "k_proj"]


def test_the_root_of_a_base_can_be_given(monkeypatch, capsys):
    monkeypatch.setattr(sandbox, "inspect", lambda *_, **__: {"root": "local:tiny", "chat": True})
    assert main(["inspect", "tiny", "--root", "lab/tiny"]) == 0
    assert json.loads(capsys.readouterr().out) == {"root": "lab/tiny", "chat": True}
    with pytest.raises(SystemExit):
        main(["inspect", "tiny", "--root", "tiny"])


def test_torch_is_not_needed_to_read_a_spec_or_check_a_file():
    code = (
        "import sys, lorainit.data.formats.file_report, lorainit.config.results, lorainit.config.events, "
        "lorainit.config.resolve, "
        "lorainit.__main__;"
        " print(sorted({'torch', 'transformers', 'peft', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("more", "field"),
    [
        *(({"training": {"batch_size": value}}, "training.batch_size") for value in (0, "many", 1.5)),
        ({"lora": {"target_modules": 3}}, "lora.target_modules"),
        ({"lora": {"target_modules": [1]}}, "lora.target_modules.0"),
        ({"lora": {"init": {"method": "pissa", "niter": "many"}}}, "lora.init.niter"),
        ({"data": {}}, "data.training"),
    ],
)
def test_a_field_of_several_kinds_is_one_fault_by_its_own_name(more, field):
    given = {"model": {"id": "x", "source": "x", "root": "local:x"}, "data": {"training": "x"}}
    with pytest.raises(ValidationError) as caught:
        RunSpec.model_validate(given | more)
    assert list(describe_errors(caught.value, given | more)) == [field]
