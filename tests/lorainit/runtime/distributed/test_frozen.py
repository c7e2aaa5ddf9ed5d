"""A process of a run of several that is frozen, whenever that is: the run ends, says why, and leaves nobody behind.

Frozen by SIGSTOP, as a GPU that does not answer any more freezes the process that waits for it.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lorainit.runtime import machine_errors
from lorainit.system import watchdog
from tests.lorainit.forked import Forked
from tests.lorainit.runtime.distributed.test_world import ENDLESS, is_there, wait

GLOO = """
import os, sys, time, torch
from pathlib import Path
from lorainit.runtime.distributed import run_errors, world
world.LATER = 0.0
folder, count = Path(sys.argv[1]), int(sys.argv[2])
folder.joinpath(os.environ["RANK"]).touch()
while len(list(folder.iterdir())) < count:  # torch is loaded by all, however busy the machine is
    time.sleep(0.01)
with run_errors.translate_errors(), world.join_world(torch.device("cpu")) as ours:
    for step in range(1000):
        if step == 20 and ours.rank == 1:
            os.kill(os.getpid(), int(sys.argv[3]))
        ours.all_reduce([torch.ones(3)])
"""


def at_once(other, out, events):
    """Before it is a program of its own."""


def before_it_has_joined(other, out, events):
    wait(lambda: "libtorch_cpu" in Path(f"/proc/{other.pid}/maps").read_text())


def while_it_verifies(other, out, events):
    wait(lambda: '"stage":"verifying"' in events.read_text())


def from_scratch(arguments, events, env):
    command = [sys.executable, "-m", "lorainit", *map(str, arguments), "--events-fd", str(events)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, pass_fds=[events])


def end_of_a_run(one, folder, when, *, leading_hangs=False, end=psutil.Process.suspend, silence=5, start=from_scratch):
    """Freeze a process of it at that moment, or `end` it; its exit code and last event, and whether anybody is left."""
    file, out, events = folder / "spec.json", folder / "out", folder / "events"
    file.write_text(one.model_dump_json())
    with events.open("w") as stream:
        env = {**os.environ, "RUN_SILENCE_SECONDS": str(silence)}
        leading = start([file, out], events=stream.fileno(), env=env)
    process = psutil.Process(leading.pid)
    wait(lambda: len(process.children()) == one.devices - 1)
    family = [process, *process.children()]
    when(family[-1], out, events)
    end(process if leading_hangs else family[-1])
    said = leading.communicate(timeout=600)[1]
    *_, last = [json.loads(line) for line in events.read_text().splitlines()] or [None]
    wait(lambda: not any(is_there(one) for one in family))
    return leading.returncode, last, said


@pytest.mark.slow
@pytest.mark.parametrize("when", [at_once, before_it_has_joined])
def test_a_process_that_never_joins_ends_the_run_and_does_not_stay(spec, tmp_path, when):
    code, last, said = end_of_a_run(spec(devices=3, training=ENDLESS), tmp_path, when)
    assert (code, last["kind"], last["code"]) == (1, "failed", "worker_lost"), said
    assert "do not answer each other" in last["message"]
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_process_that_hangs_in_the_verification_ends_the_run_and_does_not_stay(spec, tmp_path):
    """Whose base is divided: each process needs the others' parts of it."""
    one = spec(devices=2, training={"max_steps": 2, "checkpoint_interval": 1, "shard_base": True})
    code, last, said = end_of_a_run(one, tmp_path, while_it_verifies)
    assert (code, last["kind"], last["code"]) == (1, "failed", "worker_lost"), said


def test_a_process_that_is_killed_in_the_verification_is_no_verdict_on_the_adapter(spec, tmp_path):
    one = spec(devices=2, training={"max_steps": 2, "checkpoint_interval": 1, "shard_base": True})
    how = {"end": psutil.Process.kill, "silence": 1800, "start": Forked}
    code, last, said = end_of_a_run(one, tmp_path, while_it_verifies, **how)
    assert code == -signal.SIGKILL, said
    assert last["kind"] != "failed"


@pytest.mark.slow
def test_a_leading_process_that_never_joins_is_killed_by_the_others(spec, tmp_path):
    """Whoever supervises it sees a killed run, and has it tried again."""
    code, _, said = end_of_a_run(spec(devices=3, training=ENDLESS), tmp_path, before_it_has_joined, leading_hangs=True)
    assert code == -signal.SIGKILL, said


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends them there")
def test_nothing_is_left_of_a_run_whose_leading_process_dies_before_the_other_is_a_program(spec, tmp_path):
    file = tmp_path / "spec.json"
    file.write_text(spec(devices=2, training=ENDLESS).model_dump_json())
    leading = psutil.Popen([sys.executable, "-m", "lorainit", str(file), str(tmp_path / "out")])
    wait(leading.children)
    (other,) = leading.children()
    other.suspend()
    leading.kill()
    leading.wait()
    wait(lambda: not is_there(other))


def what_gloo_says(folder, count, number):
    """The leading one's error, where `count` of two processes are started and the other gets this signal."""
    ready = folder / "ready"
    ready.mkdir()
    world = {"WORLD_SIZE": "2", "RENDEZVOUS": str(folder / "meeting"), "RUN_SILENCE_SECONDS": "4"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", GLOO, str(ready), str(count), str(int(number))], stderr=subprocess.PIPE, text=True,
            env={**os.environ, **world, "RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip
    said = processes[0].communicate(timeout=300)[1]
    for process in processes[1:]:
        process.kill()
        process.communicate()
    return said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "number", "expected"),
    [
        (1, 0, "Not all 2 processes of this run connected within 4 seconds: one hangs or has ended."),
        (2, signal.SIGKILL, watchdog.PEER_GONE),
        (2, signal.SIGSTOP, "The processes of this run do not answer each other: nothing has happened for 4 seconds"),
    ],
)
def test_what_gloo_says_of_another_process_is_told_in_our_words(tmp_path, count, number, expected):
    assert f"lorainit.config.errors.DeviceSilent: {expected}" in what_gloo_says(tmp_path, count, number)


@pytest.mark.parametrize(
    ("words", "how"),
    [
        ("Wait timeout", "silent"),  # gloo's, of a process that has not come
        ("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete", "silent"),
        ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:62694. This is typically", "gone"),
        ("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:53954: Connection reset by peer.", "gone"),
        ("wait timeout after 4000ms, keys: /0//cpu//0/2", "silent"),  # a TCPStore's
        ("The client socket has timed out after 4000ms while trying to connect to (127.0.0.1, 29556).", "silent"),
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=2, OpType=ALLREDUCE)", "silent"),
        ("NCCL error in: x.cpp:1, remote process exited or there was a network error, NCCL version 2.27.3", "gone"),
        ("[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key"
         " '0', but store->get('0') got error: Connection was likely closed", "gone"),
        ("NCCL communicator was aborted on rank 0.", "gone"),
        ("NCCL error in: x.cpp:1, internal error\nncclInternalError: Internal check failed.", "gone"),
        ("ncclSystemError: System call failed. Last error: Software caused connection abort", "gone"),
        ("ncclSystemError: System call failed. Last error: network IB not found.", "gone"),
        ("shapes do not match", None),
    ],
)  # fmt: skip
def test_a_process_that_fails_the_others_is_known_by_its_librarys_words(monkeypatch, words, how):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert machine_errors.find_peer_failure(RuntimeError(words)) == how


def test_a_run_of_one_process_has_no_other_that_could_be_gone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert machine_errors.find_peer_failure(RuntimeError("Connection reset by peer")) is None
