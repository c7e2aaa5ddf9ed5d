"""The cases: initializations, options, resumed runs, groups; on the pretended GPU or a real one (`pytest -m gpu`)."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from benchmarks.gpu.day import Day
from benchmarks.gpu.jobs import MAKERS, OPTIMIZERS, Jobs, _cut, _grouped, _resumed, adapter, apart, laid
from lorainit.config.events import Checkpoint, Done, Event, Message, Stage
from lorainit.config.inits import INITS
from lorainit.config.spec import RunSpec
from lorainit.context import RunRequest
from lorainit.export import early_check
from lorainit.model.memory import copy_bytes
from lorainit.run import run_together
from lorainit.train import memory
from tests.lorainit.conftest import only_training, tiny_llama
from tests.pretended import device, layouts, rules, trouble
from tests.pretended.device import NAME
from tests.pretended.options import OF_A_RUN, of_methods
from tests.pretended.rules import Refused

Case = Callable[[Day], str]


def _refusals(_: Day) -> str:
    """What the device has to refuse for the other cases to mean anything."""
    x, host = torch.ones(4, 4, device=NAME), torch.ones(4, 4)
    trained = torch.nn.Parameter(torch.ones(4, device=NAME))
    optimizer = torch.optim.AdamW([trained], fused=True)
    trained.grad = torch.ones_like(trained)
    optimizer.step()
    optimizer.state[trained]["step"] = torch.ones(())  # on the host
    q, ends = torch.ones(4, 2, 20, device=NAME), torch.tensor([0, 4], dtype=torch.int32, device=NAME)
    attempts: dict[str, Callable[[], object]] = {
        "two devices": lambda: x @ host,
        "the host's numbers": lambda: torch.stack([x.sum(), host.sum()]),
        "the host's generator": lambda: torch.rand(2, generator=torch.Generator(), device=NAME),
        "a step on the host": optimizer.step,
        "fp32 for flash": lambda: varlen_attn(q, q, q, ends, ends, 4, 4),
        "heads of 20 for flash": lambda: varlen_attn(*3 * [q.bfloat16()], ends, ends, 4, 4),
        "grouped heads for the other kernel": lambda: _rows_by_other_kernel(q[None], q[None, :, :1], ends),
        "heads of 18 for it": lambda: _rows_by_other_kernel(*2 * [q[None, ..., :18]], ends),  # type: ignore[call-arg]
        "a sum without an order": lambda: x.cumsum(0),
    }
    taken = [name for name, attempt in attempts.items() if not _is_refused(attempt)]
    return f"it takes {', '.join(taken)}" if taken else "all refused"


def _rows_by_other_kernel(q: Tensor, k: Tensor, ends: Tensor) -> object:
    return torch.ops.aten._efficient_attention_forward(q, k, k, None, ends, ends, 4, 4, 0.0, 1, True)


def _is_refused(attempt: Callable[[], object]) -> bool:
    torch.use_deterministic_algorithms(True)
    try:
        attempt()
    except Refused:
        return True
    finally:
        torch.use_deterministic_algorithms(False)
    return False


def _ends(day: Day, **asked: Any) -> str:
    jobs = Jobs(day)
    done, heard = jobs.run(jobs.spec(**asked))
    return f"rows {laid(heard)}, {'ends checked' if done.export_check['passed'] else '**ends unchecked**'}"


def _goes_on(day: Day, **asked: Any) -> str:
    jobs = Jobs(day)
    return _resumed(jobs, jobs.spec(**asked))


def _padded(day: Day) -> str:
    """What a kernel refuses that no check here knows of is found out before training, and rows are padded."""
    jobs = Jobs(day)
    with mock.patch.object(rules, "_check_efficient", side_effect=Refused("no kernel found to launch!")):
        done, heard = jobs.run(jobs.spec(precision="fp32"))
    said = next(e for e in heard if isinstance(e, Message) and e.data["kind"] == "machine")
    settings = json.loads((Path(done.adapter) / "manifest.json").read_text())["hardware"]["settings"]
    told = "no kernel found to launch!" in said.message and settings["rows"] == "padded"
    return f"rows {said.data['rows']}, {'ends checked' if told else '**untold**'}"


def _budget(day: Day) -> str:
    """Passes are as large as the device's memory, by what two small ones take; a run that goes on there keeps them.

    In fp32: in bf16 other passes round otherwise, and a first step of Adam is the sign of each number.
    """
    jobs, has = Jobs(day), device.memory
    gc.collect()
    training = {"batch_size": 12, "max_steps": 4, "checkpoint_interval": 2}
    small = mock.patch.object(memory, "PROBED", 64), mock.patch.object(memory, "STEP", 8)
    with small[0], small[1], only_training(), layouts.tried_once():
        has.peak = has.held
        wide, _ = jobs.run(jobs.spec(training=training, precision="fp32"))
        enough, has.limit = has.limit, has.peak * 4 // 5
        narrow, heard = jobs.run(jobs.spec(training=training, precision="fp32"))
        point = next(event for event in heard if isinstance(event, Checkpoint) and event.step == 2)
        again = jobs.spec(training=training, precision="fp32", resume_from=point.path)
        with mock.patch.object(memory, "SHARE", 0.7):  # what would be measured now is something else
            rest, _ = jobs.run(again)
        has.limit = enough
        elsewhere, _ = jobs.run(again)
    runs = [done.resources for done in (wide, narrow, rest, elsewhere)]
    most, fits, kept, anew = (used["tokens_per_pass"] for used in runs)
    held_to = fits == kept < 300 < most == anew and not any(used["oom_retries"] for used in runs)
    same = apart(adapter(narrow.adapter), adapter(wide.adapter)), apart(adapter(rest.adapter), adapter(narrow.adapter))
    return "; ".join((*same, "ends checked" if held_to else f"**passes of {most}, {fits}, {kept}, {anew} tokens**"))


def _short_of_memory(day: Day) -> str:
    """Three runs, of which the first is done early, on a device with room for training and not for a second base."""
    jobs, held = Jobs(day), list[int]()
    MAKERS["broad"] = lambda: tiny_llama(512, 1024)
    specs = [jobs.spec("broad", training={"max_steps": steps, "batch_size": 2}, seed=steps) for steps in (1, 2, 3)]

    def note(event: Event) -> None:
        if isinstance(event, Stage) and event.stage == "exporting":
            held.append(device.memory.held)

    whole = _run_together(day, "whole", specs, note)
    device.memory.limit = held[0] + int(0.8 * copy_bytes(MAKERS["broad"]().bfloat16(), tokens=1, factors=0))
    heard = list[Event]()
    try:
        short = _run_together(day, "short", specs, heard.append)
    finally:
        device.memory.limit = device.PLENTY
    off = sum(isinstance(event, Message) and "put_off" in event.data for event in heard)
    cut = sum(isinstance(event, Message) and event.data.get("kind") == "oom_retry" for event in heard)
    said = [apart(adapter(one.adapter), adapter(two.adapter)) for one, two in zip(short, whole, strict=True)]
    return "; ".join([*said, f"{off} put off, {cut} batches cut"])


def _run_together(day: Day, name: str, specs: list[RunSpec], on_event: Callable[[Event], None]) -> list[Done]:
    requests = [RunRequest(spec, day.folder / f"{name}-{n}", on_event) for n, spec in enumerate(specs)]
    ends = dict(run_together(requests))
    failed = [end for end in ends.values() if not isinstance(end, Done)]
    if failed:
        raise failed[0]
    return [end for _, end in sorted(ends.items()) if isinstance(end, Done)]


_BROKEN = "CUDA error: uncorrectable ECC error encountered\nCompile with `TORCH_USE_CUDA_DSA` for assertions."


def _fails_while_it_verifies(day: Day, *, moments: Sequence[tuple[int, str, int]]) -> str:
    """The GPU fails at several moments of both checks of a download, in a run alone and in one of two."""
    jobs = Jobs(day)
    specs = [jobs.spec(training={"max_steps": steps, "batch_size": 2}) for steps in (1, 2)]
    with layouts.tried_once():
        told = {_told(day, specs[:count], stage, after) for count, stage, after in moments}
    return "told as device_failed" if told == {"device_failed"} else f"**{', '.join(sorted(told))}**"


def _told(day: Day, specs: list[RunSpec], stage: str, after: int) -> str:
    """How runs end whose GPU fails then. The check before the first step is left out where the other one fails."""
    early = mock.patch.object(early_check, "check_export_early", return_value=None)
    try:
        with early if stage == "verifying" else nullcontext():
            _run_together(day, f"fails-{stage}-{after}", specs, _breaking(stage, after))
    except Exception as error:
        return str(getattr(error, "code", type(error).__name__))
    finally:
        device.fail(None)
    return "ended well"


def _breaking(stage: str, after: int) -> Callable[[Event], None]:
    """Breaks the GPU for good so many events after this stage has begun."""
    heard = list[Event]()

    def listen(event: Event) -> None:
        if heard or (isinstance(event, Stage) and event.stage == stage):
            heard.append(event)
        if len(heard) == after + 1:
            device.fail(_BROKEN)

    return listen


def _by_two(day: Day, **asked: Any) -> str:
    """A run of two processes, beside one that is alone."""
    jobs = Jobs(day)
    alone, _ = jobs.run(jobs.spec(micro_batch_size=2, precision="fp32"))
    spec = jobs.spec(devices=2, micro_batch_size=2, precision="fp32", **asked)
    file, out = day.folder / "spec.json", day.folder / "by-two"
    file.write_text(spec.model_dump_json())
    command = [sys.executable, "-m", "lorainit", str(file), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    if done.returncode:
        return f"**it ended with exit code {done.returncode}: {done.stderr[-300:]}**"
    return apart(adapter(out / "adapter"), adapter(alone.adapter))


# On either device.
SHARED: dict[str, Case] = {
    **{f"resume {name}": partial(_goes_on, training={"optimizer": asked}) for name, asked in OPTIMIZERS.items()},
    "resume DoRA": partial(_goes_on, lora={"use_dora": True}),
    **{name: partial(_ends, lora={"init": name, "r": 4}) for name in INITS if name != "loftq"},
    "loram in fp32": partial(_ends, lora={"init": "loram", "r": 4}, precision="fp32"),
    "gpt2": partial(_ends, base="gpt2"),
    "dropout": partial(_ends, lora={"dropout": 0.1}),
    "gradient checkpointing": partial(_ends, training={"gradient_checkpointing": True}),
    "heads of 20": partial(_ends, base="narrow"),
    "heads of 20 in fp32": partial(_ends, base="narrow", precision="fp32"),
    "heads of 80": partial(_ends, base="heads-of-80"),
    "heads of 96": partial(_ends, base="heads-of-96"),
    "heads of 208": partial(_ends, base="heads-of-208"),
    "heads of 512": partial(_ends, base="heads-of-512"),
    "heads of 512 in fp32": partial(_ends, base="heads-of-512", precision="fp32"),
    "windows": partial(_ends, base="windows"),
    "windows in fp32": partial(_ends, base="windows", precision="fp32"),
    "group": lambda day: _grouped(Jobs(day)),
    "validation": lambda day: _ends(day, data={"validation": str(Jobs(day).rows)}),
    **{name: partial(_ends, **asked) for name, asked in (OF_A_RUN | of_methods()).items()},
}

# What is asked of the pretended device itself: what it refuses, and how much memory it has.
PRETENDED: dict[str, Case] = {
    "refusals": _refusals,
    "no kernel for packed rows": _padded,
    "token budget": _budget,
    "group without room for two bases": _short_of_memory,
    "a GPU that fails while it verifies": partial(
        _fails_while_it_verifies, moments=[(1, "initializing", 30), (2, "verifying", 1)]
    ),
    "a GPU that fails as a check begins": partial(
        _fails_while_it_verifies, moments=[(1, "initializing", 0), (1, "verifying", 0)]
    ),
    "no memory in a backward pass": trouble.no_memory_in_backward,
    "no memory in any backward pass": trouble.never_memory_in_backward,
    "a GPU that fails in a backward pass": trouble.fails_in_backward,
}

# What it has not: kernels of bitsandbytes, an allocator, and neighbours.
REAL: dict[str, Case] = {
    "nf4": partial(_ends, lora={"init": "lora_one", "r": 4, "quantization": "nf4"}),
    "loftq on nf4": partial(_ends, lora={"init": "loftq", "r": 4, "quantization": "nf4"}),
    "compiled layers": partial(_ends, training={"compile": True}),
    "a step that does not fit": lambda day: _cut(Jobs(day)),
}
# Each by two processes, on two devices of a machine that has them.
BY_TWO: dict[str, Case] = {
    "two devices": _by_two,
    "two devices that divide the base": partial(_by_two, training={"shard_base": True}),
}


def cases_on(kind: str) -> dict[str, Case]:
    """The cases by name: of the device `pretended`, or of a real one, `cuda`."""
    return SHARED | (PRETENDED if kind == "pretended" else REAL | BY_TWO)
