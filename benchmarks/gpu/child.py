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
from lorainit.config.spec import RunSpec
from tests.lorainit.conftest import chat, make_tokenizer, write_rows

STARTS: dict[str, dict[str, Any]] = {
    "kaiming": {}, "pissa": {}, "lora_ga": {"samples": 32}, "lora_one": {}, "eva": {"samples": 32},
    "corda": {"samples": 32}, "loram": {},
}  # fmt: skip
ENDS = ("done", "failed")
SENTENCE = "It is four, my friend, and the cat sat on two mats. "


def whole(day: Day) -> None:
    """Base on disk, spec, child process, checked adapters; then what the device still holds. Told as it comes."""
    names = ["kaiming"] if day.tiny else list(STARTS)
    specs = _prepared(day, names)
    before = _held(day)
    heard: dict[int, list[dict[str, Any]]] = {who: [] for who in range(len(names))}
    for event in _watched(day, specs):
        heard[event["member"]].append(event)
        _told(day, names[event["member"]], heard[event["member"]], event)
    for who, name in enumerate(names):
        if not any(event["kind"] in ENDS for event in heard[who]):
            day.say(f"- {name}: **it has no end**")
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
    """The child's events with the seconds since it was started, `at`."""
    reading, writing = os.pipe()
    first, *others = [(str(spec), str(day.folder / f"out-{spec.stem}")) for spec in specs]
    lease = day.folder / "lease"
    lease.write_text(str(time.clock_gettime(time.CLOCK_MONOTONIC) + 600))
    more = [part for one in others for part in ("--member", *one, str(lease))]
    command = [sys.executable, "-m", "lorainit", *first, "--events-fd", str(writing), *more]
    started = time.monotonic()
    with subprocess.Popen(command, pass_fds=[writing], cwd=Path(__file__).parents[2]) as child:
        os.close(writing)
        with os.fdopen(reading) as stream:
            for line in stream:
                yield {**json.loads(line), "at": time.monotonic() - started}
        if child.wait():
            day.say(f"- **the child ended with exit code {child.returncode}**")


def _told(day: Day, name: str, heard: list[dict[str, Any]], event: dict[str, Any]) -> None:
    """The line that an adapter's event is worth, if it is."""
    if event["kind"] == "init_report":
        day.say(f"- {name}: initialized in {event['report']['seconds']:.1f} s, {event['at']:.0f} s after the start")
    elif event["kind"] == "failed":
        day.say(f"- {name}: **{event['code']}: {event['message']}**")
    elif event["kind"] == "done":
        day.say(f"- {name}: {_trained(heard, event)}")


def _trained(heard: list[dict[str, Any]], done: dict[str, Any]) -> str:
    stages = [e for e in heard if e["kind"] == "stage"]
    seconds = ", ".join(f"{a['stage']} {b['at'] - a['at']:.1f}" for a, b in pairwise([*stages, done]))
    steps = [e["at"] for e in heard if e["kind"] == "metrics" and e["train_loss"] is not None]
    off = done["export_check"]["max_abs_logit_difference"]
    said = f"last step {1e3 * (steps[-1] - steps[-2]):.0f} ms; exported and checked, logits at most {off:.1e} from"
    said += f" stock PEFT's; peak {done['resources']['peak_memory_bytes'] / 2**30:.1f} GiB"
    return f"{said}; seconds: until it spoke {heard[0]['at']:.1f}, {seconds}"


def _held(day: Day) -> float:
    """MiB of the device in use, whoever uses them."""
    if not day.has_gpu:
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20
