"""Whole jobs on tiny random bases, `lorainit.run.run` from file to checked adapter, on the device."""

import gc
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.gpu.day import Day, held
from benchmarks.gpu.plan import NOT_TRIED
from lorainit.config.events import Checkpoint, Done, Event, Message, Metrics
from lorainit.config.inits import INITS
from lorainit.config.spec import RunSpec
from lorainit.context import RunRequest
from lorainit.run import run, run_together
from lorainit.runtime import devices
from tests.lorainit.conftest import chat, make_tokenizer, tiny_gpt2, tiny_llama, tiny_mistral, write_rows

WORDS = ["the", "cat", "sat", "on", "two", "mats", "and", "it", "is", "four", "my", "friend", "so", "what"]
MAKERS = {
    "llama": lambda: tiny_llama(64, 128),
    "gpt2": lambda: tiny_gpt2(64),
    "narrow": lambda: tiny_llama(80, 48),  # heads of 20, which no kernel takes as they are
    **{f"heads-of-{size}": partial(tiny_llama, 64, 48, head_dim=size) for size in (80, 96, 208, 512)},
    "windows": lambda: tiny_mistral(16),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"name": "adamw"},
    "LoRA+": {"name": "adamw_lora_plus", "ratio": 16},
    "preconditioned AdamW": {"name": "adamw_preconditioned"},
    "preconditioned AdamW, simultaneous": {"name": "adamw_preconditioned", "update": "simultaneous"},
}
# Adam's first steps are signs: an entry whose gradient is rounding may go either way.
SAME_TRAINING = 2e-2


class Jobs:
    """Bases and rows in a section's folder, and specs over them."""

    def __init__(self, day: Day) -> None:
        self.day, self.count, self.made = day, 0, set[str]()
        count = 12
        made = [chat(f"What is {word}?", " ".join(WORDS[: 2 + i])) for i, word in enumerate(WORDS[:count])]
        self.rows = write_rows(day.folder / "train.jsonl", made)

    def base(self, name: str) -> Path:
        folder = self.day.folder / name
        if not folder.exists():
            MAKERS[name]().save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
        return folder

    def spec(self, base: str = "llama", *, precision: str = "bf16", **over: Any) -> RunSpec:
        training = {"max_steps": 4, "batch_size": 5, "learning_rate": 1e-3, "checkpoint_interval": 2}
        value: dict[str, Any] = {
            "model": {"id": base, "source": str(self.base(base)), "root": f"gpu-day/{base}", "max_length": 256},
            "data": {"training": str(self.rows), "validation": None},
            "lora": {"init": "kaiming", "r": 4},
            "training": {**training, "precision": precision},
        }
        for key, more in over.items():
            value[key] = value[key] | more if isinstance(value.get(key), dict) else more
        return RunSpec.model_validate(value)

    def run(self, spec: RunSpec) -> tuple[Done, list[Event]]:
        """In a new folder; with everything that was said."""
        self.count += 1
        heard: list[Event] = []
        return run(spec, self.day.folder / f"out-{self.count}", heard.append), heard


def adapter(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def apart(one: dict[str, Tensor], two: dict[str, Tensor]) -> str:
    """How far two adapters are from each other, in words; bold where that is more than rounding."""
    if all(torch.equal(one[name], two[name]) for name in one):
        return "the same bits"
    off = max(float((one[n] - two[n]).norm() / two[n].norm().clamp(min=1e-9)) for n in one)
    return held(off < SAME_TRAINING, f"factors differ by {off:.1e}")


def products(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """B·A of every module: factors alone may differ by signs of singular vectors."""
    modules = [name.removesuffix("lora_A.weight") for name in factors if name.endswith("lora_A.weight")]
    return {m: factors[f"{m}lora_B.weight"].double() @ factors[f"{m}lora_A.weight"].double() for m in modules}


def laid(heard: list[Event]) -> str:
    """How rows shared a pass; bold where they did not: every base here can pack them."""
    facts = [e.data for e in heard if isinstance(e, Message) and e.data.get("kind") == "machine"]
    said = next(data for data in facts if "rows" in data)
    return held(said["rows"] == "packed", str(said["rows"]))


# --- sections --------------------------------------------------------------------------------------


def llama(day: Day) -> None:
    """Every initialization, twice: it ends checked, and with the same bits."""
    _every_initialization(day, "llama")


def gpt2(day: Day) -> None:
    """The same on a base with biases, learned positions and transposed weights."""
    _every_initialization(day, "gpt2")


def _every_initialization(day: Day, base: str) -> None:
    jobs = Jobs(day)
    for name in _initializations(day):
        day.attempt(name, lambda n=name: _twice(jobs, jobs.spec(base, lora={"init": n, "r": 4})))


def _initializations(day: Day) -> list[str]:
    """All on a full-precision base."""
    every = [name for name, config in INITS.items() if None in config.facts.quantization]
    return ["lora_one"] if day.tiny else every


def _twice(jobs: Jobs, spec: RunSpec) -> str:
    done, heard = jobs.run(spec)
    off = done.export_check["max_abs_logit_difference"]
    losses = [e.train_loss for e in heard if isinstance(e, Metrics) and e.train_loss is not None]
    text = f"rows {laid(heard)}, ends checked, logits at most {off:.1e} from stock PEFT's"
    text += f", loss {losses[0]:.3f} to {losses[-1]:.3f}"
    if jobs.day.tiny:
        return text
    again, _ = jobs.run(spec)
    return f"{text}; a second run: {apart(adapter(again.adapter), adapter(done.adapter))}"


def resume(day: Day) -> None:
    """A run that goes on from its checkpoint beside one that was never interrupted."""
    jobs = Jobs(day)
    starts = {"kaiming": {"init": "kaiming"}, "lora_ga, subtracted": {"init": "lora_ga"}, "DoRA": {"use_dora": True}}
    pairs = [(o, s) for o in OPTIMIZERS for s in starts if o == "AdamW" or s != "lora_ga, subtracted"]
    for optimizer, start in pairs[:1] if day.tiny else pairs:
        spec = jobs.spec(lora=starts[start], training={"optimizer": OPTIMIZERS[optimizer]})
        day.attempt(f"{optimizer}, {start}", lambda s=spec: _resumed(jobs, s))


def _resumed(jobs: Jobs, spec: RunSpec) -> str:
    whole, heard = jobs.run(spec)
    point = next(event for event in heard if isinstance(event, Checkpoint) and event.step == 2)
    rest, _ = jobs.run(spec.model_copy(update={"resume_from": point.path}))
    return apart(adapter(rest.adapter), adapter(whole.adapter))


def options(day: Day) -> None:
    """What a spec can ask for beside an initialization, and runs that share a pass."""
    jobs = Jobs(day)
    cases = {
        "DoRA": {"lora": {"use_dora": True}},
        "dropout": {"lora": {"dropout": 0.1}},
        "gradient checkpointing": {"training": {"gradient_checkpointing": True}},
        "heads of 20": {"base": "narrow"},
        "heads of 20, fp32": {"base": "narrow", "precision": "fp32"},
        "heads of 512": {"base": "heads-of-512"},
        "heads of 512, fp32": {"base": "heads-of-512", "precision": "fp32"},
        "windows, fp32": {"base": "windows", "precision": "fp32"},
        "validation rows": {"data": {"validation": str(jobs.rows)}},
        "not deterministic": {"deterministic": False},
        "compiled layers": {"training": {"compile": True}},
    }
    for name, asked in list(cases.items())[: 1 if day.tiny else None]:
        day.attempt(name, lambda a=asked: _twice(jobs, jobs.spec(**a)))
    day.attempt("several in one pass, each beside itself alone", lambda: _grouped(jobs))


def _grouped(jobs: Jobs) -> str:
    starts = ["kaiming", "loram"] if jobs.day.tiny else ["kaiming", "pissa", "loram"]
    specs = [jobs.spec(lora={"init": name, "r": 4}) for name in starts]
    requests = [
        RunRequest(s, jobs.day.folder / f"group-{n}", lambda _: None) for n, s in zip(starts, specs, strict=True)
    ]
    ends = dict(run_together(requests))
    said = []
    for who, (name, spec) in enumerate(zip(starts, specs, strict=True)):
        end = ends[who]
        if not isinstance(end, Done):
            raise end
        said.append(f"{name}: {apart(adapter(end.adapter), adapter(jobs.run(spec)[0].adapter))}")
    return "; ".join(said)


def processor(day: Day) -> None:
    """What fp32 training adds to the weights here and on the processor, from the same seed."""
    jobs = Jobs(day)
    for name in _initializations(day):
        spec = jobs.spec(lora={"init": name, "r": 4}, precision="fp32")
        day.attempt(name, lambda s=spec: _on_both(jobs, s))


def _on_both(jobs: Jobs, spec: RunSpec) -> str:
    here = products(adapter(jobs.run(spec)[0].adapter))
    with mock.patch.object(devices, "pick_device", return_value=torch.device("cpu")):
        there = products(adapter(jobs.run(spec)[0].adapter))
    off = max(float((here[m] - there[m]).norm() / there[m].norm()) for m in there)
    return held(off < SAME_TRAINING, f"B·A differ by at most {off:.1e}")


def nf4(day: Day) -> None:
    """Bases in NF4, where bitsandbytes is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        day.say(f"- {NOT_TRIED}: bitsandbytes is not installed")
        return
    jobs = Jobs(day)
    names = [name for name, config in INITS.items() if "nf4" in config.facts.quantization]
    for base, name in [("llama", name) for name in names[: 1 if day.tiny else None]] + (
        [] if day.tiny else [("gpt2", "kaiming")]
    ):
        spec = jobs.spec(base, lora={"init": name, "r": 4, "quantization": "nf4"})
        day.attempt(f"{name} on {base}", lambda s=spec: _twice(jobs, s))


def memory(day: Day) -> None:
    """A step that does not fit is cut into smaller passes, and the run ends."""
    if not day.has_gpu:
        day.say(f"- {NOT_TRIED}: a processor has no limit that a process can set itself")
        return
    day.attempt("a batch that does not fit", lambda: _cut(Jobs(day)))


def _cut(jobs: Jobs) -> str:
    words = " ".join(WORDS * 3)
    jobs.rows = write_rows(jobs.day.folder / "long.jsonl", [chat(f"What is {i}?", words) for i in range(32)])
    wide = tiny_llama(1024, 4096)
    wide.save_pretrained(jobs.day.folder / "wide")
    make_tokenizer().save_pretrained(jobs.day.folder / "wide")
    spec = jobs.spec("wide", training={"batch_size": 32, "gradient_checkpointing": False})
    torch.cuda.reset_peak_memory_stats()
    base = sum(p.numel() for p in wide.parameters()) * 2
    whole, _ = jobs.run(spec)
    needed = torch.cuda.max_memory_allocated()
    gc.collect()
    torch.cuda.empty_cache()
    # The base twice is what the export check holds in passing.
    limit = max(2.2 * base, base + 0.5 * (needed - base))
    with _at_most(limit):
        cut, heard = jobs.run(spec)
    said = [e.message for e in heard if isinstance(e, Message) and e.data.get("kind") == "oom_retry"]
    text = (
        f"{needed / 2**20:.0f} MiB needed, {limit / 2**20:.0f} given: {said[-1] if said else 'it fitted all the same'}"
    )
    return held(bool(said), f"{text}; beside the run with room: {apart(adapter(cut.adapter), adapter(whole.adapter))}")


@contextmanager
def _at_most(size: float) -> Iterator[None]:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(size / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
