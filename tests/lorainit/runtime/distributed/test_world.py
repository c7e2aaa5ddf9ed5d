"""One run by two processes: the adapter of one process, written once."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import psutil
import pytest
import torch
from safetensors.torch import load_file

from lorainit.config.events import Failed
from lorainit.run import run
from lorainit.runtime.distributed.launch import PeerProcesses
from lorainit.system import shared_memory, watchdog
from tests.lorainit.conftest import only_training
from tests.lorainit.forked import Forked
from tests.servers import free_port

SPOILED = "import atexit, os, sys\natexit.register(os.abort)\n"


def by_ourselves(arguments):
    """One process, which starts the other. Their interpreters cannot be taken down.

    As where Gloo's threads end the process with SIGABRT on the way; here something does so always.
    """
    return [subprocess.Popen([sys.executable, "-m", "lorainit", *arguments], stderr=subprocess.PIPE, text=True)]


def by_torchrun(arguments):
    """Two processes in the environment that torchrun gives them."""
    return [Forked(arguments, env=environment) for environment in torchruns()]


def by_torchrun_from_scratch(arguments):
    """The same, with interpreters that cannot be taken down."""
    command = [sys.executable, "-m", "lorainit", *arguments]
    return [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for env in torchruns()]


def torchruns():
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    return [{**os.environ, **world, "RANK": str(rank)} for rank in range(2)]


@pytest.fixture(scope="module")
def asked(spec, rows):
    """Five rows a step in pieces of two: one process has two pieces, the other one."""
    return spec(
        micro_batch_size=2, data={"validation": str(rows)}, lora={"init": "pissa", "r": 4},
        training={"max_steps": 4, "eval_interval": 2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(asked, tmp_path_factory):
    """The folder of what one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    with only_training():
        run(asked, folder, lambda event: None)
    return folder


@pytest.fixture(
    scope="module", params=[by_ourselves, by_torchrun, pytest.param(by_torchrun_from_scratch, marks=pytest.mark.slow)]
)
def both(asked, tmp_path_factory, request):
    """The folder of the run by two processes, their exit codes and what they said."""
    folder = tmp_path_factory.mktemp("both")
    file = folder / "spec.json"
    file.write_text(asked.model_copy(update={"devices": 2}).model_dump_json())
    (folder / "sitecustomize.py").write_text(SPOILED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        processes = request.param([str(file), str(folder / "shared")])
    said = [process.communicate(timeout=600)[1] for process in processes]
    return folder / "shared", [process.returncode for process in processes], said


def test_a_run_that_is_done_stays_done_where_the_interpreter_cannot_be_taken_down(both):
    _, codes, said = both
    assert set(codes) == {0}, said


def test_two_processes_train_what_one_trains(both, alone):
    folder, _, said = both
    assert "".join(said).count("Adapter:") == 1
    assert not list(folder.glob("rendezvous*"))
    ours, theirs = (load_file(where / "adapter" / "adapter_model.safetensors") for where in (folder, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-4, atol=2e-6), name
    logs = [(where / "metrics.jsonl").read_text().splitlines() for where in (folder, alone)]
    assert len(logs[0]) == len(logs[1]) == 5
    for line, expected in zip(*(map(json.loads, log) for log in logs), strict=True):
        for name in ("step", "tokens", "epoch"):
            assert line[name] == expected[name]
        for name in ("train_loss", "full_valid_loss", "train_mean_token_accuracy"):
            assert line[name] is expected[name] is None or abs(line[name] - expected[name]) < 1e-5


@contextmanager
def training(one, folder, *, silence=1800):
    """A long run of several processes that is training: the leading process and the others."""
    file, out = folder / "spec.json", folder / "a folder for it"
    file.write_text(one.model_dump_json())
    leading = Forked([file, out], env={**os.environ, "RUN_SILENCE_SECONDS": str(silence)})
    wait(lambda: (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) > 3)
    others = psutil.Process(leading.pid).children()
    yield leading, others
    leading.kill()
    for process in others:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    leading.communicate()


ENDLESS = {"max_steps": 100_000, "checkpoint_interval": 100_000}


@pytest.fixture
def two(spec, tmp_path):
    with training(spec(devices=2, training=ENDLESS), tmp_path) as (leading, (other,)):
        yield leading, other


def wait(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "that did not happen"
        time.sleep(0.05)


def test_what_one_process_alone_finds_wrong_is_the_runs_error(spec, rows, tmp_path):
    """The spec is a pipe, from which the second process reads of a file that is none."""
    good, pipe, nothing = spec(devices=2), tmp_path / "spec.json", tmp_path / "none.jsonl"
    bad = good.model_copy(update={"data": good.data.model_copy(update={"training": str(nothing)})})
    nothing.write_text("no row\n")
    os.mkfifo(pipe)
    reader, writer = os.pipe()
    leading = Forked([pipe, tmp_path / "out"], events=writer)
    os.close(writer)
    pipe.write_text(good.model_dump_json())
    wait(lambda: psutil.Process(leading.pid).children())  # by then the first has read its own
    pipe.write_text(bad.model_dump_json())
    _, said = leading.communicate(timeout=600)
    with os.fdopen(reader) as told:
        *_, last = (json.loads(line) for line in told)
    assert leading.returncode == 1
    assert (last["kind"], last["code"], last["param"]) == ("failed", "invalid_training_file", "data.training"), said


def process_that(out, rank, *, says=None, how="sys.exit(1)", message="m"):
    """A stand-in for a companion, which leaves a word and ends."""
    if says is not None:
        out.joinpath(f"failed-{rank}.json").write_text(Failed(code=says, message=message, param="p").model_dump_json())
    return subprocess.Popen([sys.executable, "-c", f"import os, sys; {how}"])


@pytest.mark.parametrize(
    ("says", "how", "expected"),
    [
        ("out_of_memory", "sys.exit(1)", (1, "out_of_memory")),
        (None, "os.kill(os.getpid(), 9)", (-9, None)),
        (None, "sys.exit(75)", (75, None)),
    ],
)
def test_of_several_that_end_the_one_that_others_followed_is_the_cause(tmp_path, says, how, expected):
    """The others say only that somebody is gone."""
    followers = {rank: process_that(tmp_path, rank, says="internal_error") for rank in (1, 3)}
    processes = [followers[1], process_that(tmp_path, 2, says=says, how=how), followers[3]]
    for process in processes:
        process.wait()  # however long a busy machine takes to start them
    others = PeerProcesses(processes, tmp_path)
    loss = others.find_failure()
    assert (loss.code, loss.event and loss.event.code) == expected
    others.close()


def test_a_full_dev_shm_of_one_is_the_cause_of_what_the_others_say(tmp_path):
    said = {1: watchdog.PEER_GONE, 2: shared_memory.FULL, 3: watchdog.PEER_GONE}
    processes = [process_that(tmp_path, rank, says="worker_lost", message=words) for rank, words in said.items()]
    others = PeerProcesses(processes, tmp_path)
    assert others.find_failure().event.message == shared_memory.FULL
    others.close()


def test_processes_that_end_well_or_are_none_are_no_loss(tmp_path):
    assert PeerProcesses().find_failure() is None
    others = PeerProcesses([process_that(tmp_path, 1, how="sys.exit(0)")], tmp_path)
    assert others.find_failure() is None
    others.close()


def test_of_three_processes_none_is_left_when_one_dies_and_the_run_ends_by_the_same_signal(spec, tmp_path):
    """Whoever watches the run then knows whether it was killed from outside, and does not wait for the next sum."""
    with training(spec(devices=3, micro_batch_size=1, training=ENDLESS), tmp_path) as (leading, others):
        assert len(others) == 2
        others[0].send_signal(signal.SIGSEGV)
        _, said = leading.communicate(timeout=600)
        assert leading.returncode == -signal.SIGSEGV
        assert "of this run ended with exit code -11" in said
        wait(lambda: not any(is_there(other) for other in others))


def test_a_process_that_hangs_ends_its_run_with_the_reason(spec, tmp_path):
    """It is frozen, as a device that does not answer any more freezes the process that waits for it."""
    with training(spec(devices=2, training=ENDLESS), tmp_path, silence=20) as (leading, (other,)):
        other.suspend()
        _, said = leading.communicate(timeout=600)
        assert leading.returncode == 1
        assert "The processes of this run do not answer each other: nothing has happened for 20 seconds" in said
        wait(lambda: not is_there(other))


@pytest.mark.slow
def test_a_leading_process_that_hangs_is_killed_by_the_others(spec, tmp_path):
    """Whoever supervises it sees a killed run, and has it tried again."""
    with training(spec(devices=2, training=ENDLESS), tmp_path, silence=20) as (leading, (other,)):
        leading.send_signal(signal.SIGSTOP)
        leading.communicate(timeout=600)
        assert leading.returncode == -signal.SIGKILL
        wait(lambda: not is_there(other))


def is_there(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_nothing_is_left_of_a_run_whose_leading_process_dies(two):
    leading, other = two
    other.suspend()  # otherwise it would end by itself, because Gloo notices that its peer is gone
    leading.kill()
    leading.wait()
    wait(lambda: not is_there(other))


def test_a_run_of_two_processes_stops_when_it_is_asked(two):
    leading, other = two
    leading.terminate()
    leading.communicate(timeout=600)
    assert leading.returncode == 143
    wait(lambda: not other.is_running())
