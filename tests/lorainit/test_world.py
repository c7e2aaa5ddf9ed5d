"""One run by two processes: the adapter of one process, written once."""

import json
import os
import socket
import subprocess
import sys

import torch
from safetensors.torch import load_file

from lorainit.run import run


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_train_what_one_trains(spec, rows, tmp_path):
    """Five rows a step in pieces of two: one process has two pieces, the other one."""
    one = spec(
        micro_batch_size=2, data={"validation": str(rows)}, lora={"init": "pissa", "r": 4},
        training={"max_steps": 4, "eval_interval": 2},
    )  # fmt: skip
    alone = run(one, tmp_path / "alone", lambda event: None)
    file = tmp_path / "spec.json"
    file.write_text(one.model_dump_json())
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lorainit", str(file), str(tmp_path / "shared")]
    processes = [
        subprocess.Popen(command, env={**os.environ, **world, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "Adapter:" in said[0]
    assert "Adapter:" not in said[1]
    ours = load_file(tmp_path / "shared" / "adapter" / "adapter_model.safetensors")
    theirs = load_file(f"{alone.adapter}/adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-4, atol=2e-6), name
    logs = [(tmp_path / who / "metrics.jsonl").read_text().splitlines() for who in ("shared", "alone")]
    assert len(logs[0]) == len(logs[1]) == 5
    for line, expected in zip(*(map(json.loads, log) for log in logs), strict=True):
        for name in ("step", "tokens", "epoch"):
            assert line[name] == expected[name]
        for name in ("train_loss", "full_valid_loss", "train_mean_token_accuracy"):
            assert line[name] is expected[name] is None or abs(line[name] - expected[name]) < 1e-5
