"""A run of several adapters as a user starts it, `python -m lorainit`, on a base of 1B that lies on disk."""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.day import Day, held, llama
from lorainit.spec import RunSpec
from tests.lorainit.conftest import chat, make_tokenizer, write_rows

STARTS: dict[str, dict[str, Any]] = {
    "kaiming": {}, "pissa": {}, "lora_ga": {"samples": 32}, "lora_one": {}, "eva": {"samples": 32},
    "corda": {"samples": 32}, "loram": {},
}  # fmt: skip
SENTENCE = "It is four, my friend, and the cat sat on two mats. "


def whole(day: Day) -> None:
    """Base on disk, spec, child process, checked adapters; then what the device still holds."""
    names = ["kaiming"] if day.tiny else list(STARTS)
    specs = _prepared(day, names)
    before = _held(day)
    started = time.monotonic()
    events = list(_watched(day, specs))
    for who, name in enumerate(names):
        _told(day, name, [e for e in events if e["member"] == who], started if who == 0 else None)
    after = _held(day)
    if day.has_gpu:
        text = f"{after - before:.0f} MiB more than before it"
        day.say(f"- when the process has ended, the device holds {held(after - before < 64, text)}")


def _prepared(day: Day, names: list[str]) -> list[Path]:
    base = day.folder / "base"
    model = llama("tiny" if day.tiny else "1B", day.device, torch.bfloat16)
    model.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    del model
    if day.has_gpu:
        torch.cuda.empty_cache()
    times, count = (2, 6) if day.tiny else (12, 64)
    rows = [chat(f"What is {i}? " + SENTENCE * times, SENTENCE * (times - i % 2)) for i in range(count)]
    data = write_rows(day.folder / "train.jsonl", rows)
    paths = []
    for name in names:
        value = {
            "model": {"id": "base", "source": str(base), "root": "gpu-day/base", "max_length": 1024},
            "data": {"training": str(data)},
            "lora": {"init": {"method": name, **STARTS[name]}, "r": 16},
            "training": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-4, "checkpoint_interval": 100},
        }
        paths.append(day.folder / f"{name}.json")
        paths[-1].write_text(RunSpec.model_validate(value).model_dump_json())
    return paths


def _watched(day: Day, specs: list[Path]) -> Any:
    """The child's events with the moment each came, `at`."""
    reading, writing = os.pipe()
    first, *others = [(str(spec), str(day.folder / f"out-{spec.stem}")) for spec in specs]
    lease = day.folder / "lease"
    lease.write_text(str(time.clock_gettime(time.CLOCK_MONOTONIC) + 600))
    more = [part for one in others for part in ("--member", *one, str(lease))]
    command = [sys.executable, "-m", "lorainit", *first, "--events-fd", str(writing), *more]
    with subprocess.Popen(command, pass_fds=[writing], cwd=Path(__file__).parents[2]) as child:
        os.close(writing)
        with os.fdopen(reading) as stream:
            for line in stream:
                yield {**json.loads(line), "at": time.monotonic()}
        if child.wait():
            day.say(f"- **the child ended with exit code {child.returncode}**")


def _told(day: Day, name: str, events: list[dict[str, Any]], started: float | None) -> None:
    ends = [e for e in events if e["kind"] in ("done", "failed")]
    if not ends or ends[-1]["kind"] == "failed":
        day.say(f"- {name}: **{ends[-1]['code']}: {ends[-1]['message']}**" if ends else f"- {name}: **it has no end**")
        return
    at = {e["stage"]: e["at"] for e in events if e["kind"] == "stage"}
    report = next(e["report"] for e in events if e["kind"] == "init_report")
    said = f"initialized in {report['seconds']:.1f} s"
    if started is not None:
        stages = [e for e in events if e["kind"] == "stage"]
        seconds = [f"{a['stage']} {b['at'] - a['at']:.1f}" for a, b in pairwise([*stages, ends[-1]])]
        said += f"; seconds of the process: until it speaks {events[0]['at'] - started:.1f}, {', '.join(seconds)}"
    steps = [e["at"] for e in events if e["kind"] == "metrics" and e["train_loss"] is not None]
    check = ends[-1]["export_check"]["max_abs_logit_difference"]
    said += f"; last step {1e3 * (steps[-1] - steps[-2]):.0f} ms; exported and checked"
    said += f" in {ends[-1]['at'] - at['exporting']:.1f} s, logits at most {check:.1e} from stock PEFT's"
    day.say(f"- {name}: {said}; peak {ends[-1]['resources']['peak_memory_bytes'] / 2**30:.1f} GiB")


def _held(day: Day) -> float:
    """MiB of the device in use, whoever uses them."""
    if not day.has_gpu:
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20
