"""What `make gpu-day` does, in which order, and how ten minutes are shared out. Loads no library.

Sections are begun in order, cheapest and most telling first. Each has a limit of its own, and none is given more than
what is left of the ten minutes. What is no longer begun, or not to its end, is told on the page as not tried.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

BUDGET = 600.0  # seconds of the whole command
LEAST = 15.0  # seconds; with fewer a section would hardly have loaded torch

# Exit codes.
HELD, WRONG, NO_GPU, NOT_ALL_TRIED = 0, 1, 2, 3

# Marks in the sections' words, by which they are judged: bold is what did not hold.
BOLD, NOT_TRIED = "**", "not tried"


@dataclass(frozen=True)
class Section:
    """One process. `shows`: what its lines tell, for the page; `where`: the module and function that say them.

    `seconds`: the most it may take in all; `each`: the most that one of its cases may: then it is taken to hang.
    `alone`: it is timed, so nothing runs beside it. `all_gpus`: it sees every GPU and not only the first.
    """

    name: str
    title: str
    shows: str
    where: tuple[str, str]
    seconds: float
    each: float = 40.0
    alone: bool = False
    all_gpus: bool = False


SECTIONS = [
    Section(
        "machine",
        "The machine",
        "names, driver and versions; what a large copy and a large bf16 product reach here",
        ("kernels", "machine"), 30, alone=True,
    ),
    Section(
        "attention",
        "Attention",
        "packed rows by our attention, outputs and gradients, beside explicit attention in float64: relative errors; "
        "head sizes 20 to 512, grouped heads, windows, fp32 and bf16",
        ("kernels", "attention"), 40,
    ),
    Section(
        "dead-zone",
        "Small updates beside a large W·x",
        "which share of a small update is left in the sum with a large W·x: 1 is all of it",
        ("kernels", "dead_zone"), 30,
    ),
    Section(
        "resume",
        "Resumed runs",
        "AdamW, LoRA+, preconditioned AdamW: a run that goes on from its checkpoint beside one never interrupted",
        ("jobs", "resume"), 50,
    ),
    Section(
        "memory",
        "When memory runs out",
        "a step that does not fit is cut, and the run ends with the same adapter",
        ("jobs", "memory"), 40,
    ),
    Section(
        "cases",
        "Whole runs of every kind",
        "the cases that run on the pretended GPU of `tests/pretended`, on this one, and those that cannot run there: "
        "NF4, compiled layers, a step that does not fit, two devices by NCCL where there are two",
        ("cases", "cases"), 150, each=60, all_gpus=True,
    ),
    Section(
        "steps",
        "Steps",
        "135M, 1B and 8B shapes: milliseconds, tokens per second, share of the device's peak, kernels, processor time, "
        "peak memory, waits; with kernels that repeat bit by bit, which is a job's default, and without; beside "
        "`transformers.Trainer` with PEFT",
        ("speed", "steps"), 110, each=50, alone=True,
    ),
    Section(
        "unsloth",
        "The same steps by Unsloth",
        "the 135M and 1B steps by Unsloth, if it is installed",
        ("rivals", "unsloth"), 40, alone=True,
    ),
    Section(
        "groups",
        "Adapters together in one pass",
        "eight adapters in one pass beside one of them alone",
        ("speed", "groups"), 40, alone=True,
    ),
    Section(
        "child",
        "A whole run of seven adapters on a base of 1B",
        "as a user starts it: seconds of each stage and each initialization, and whether the device's memory is free "
        "afterwards",
        ("child", "whole"), 90, each=90, alone=True,
    ),
    Section(
        "jobs-llama",
        "Every initialization on a tiny Llama",
        "from file to checked adapter, in bf16, twice: the same bits?",
        ("jobs", "llama"), 60,
    ),
    Section(
        "nf4",
        "Bases in four bits",
        "every initialization that can start on an NF4 base, if bitsandbytes is installed",
        ("jobs", "nf4"), 60,
    ),
    Section(
        "options",
        "Options and groups",
        "DoRA, dropout, gradient checkpointing, heads of 20 and 512, windows, validation, compiled layers, each twice; "
        "several adapters in one pass beside each alone",
        ("jobs", "options"), 60, each=50,
    ),
    Section(
        "processor",
        "The same run on the processor, in fp32",
        "every initialization, here and on the processor: what training adds is the same",
        ("jobs", "processor"), 60,
    ),
    Section(
        "jobs-gpt2",
        "Every initialization on a tiny GPT-2",
        "as on the Llama: biases, learned positions, transposed weights",
        ("jobs", "gpt2"), 60,
    ),
]  # fmt: skip


class Clock:
    """The ten minutes, from the moment that it is made."""

    def __init__(self, budget: float = BUDGET, *, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.until = now, now() + budget

    def given(self, section: Section) -> float:
        """Seconds that a section may have if it begins now: its limit, or what is left; 0 where that is too little."""
        left = self.until - self.now()
        return min(section.seconds, left) if left >= LEAST else 0.0


def waves(sections: Sequence[Section]) -> list[list[Section]]:
    """Sections that run together, in order: those that check, side by side; each that is timed, by itself."""
    found: list[list[Section]] = []
    for section in sections:
        if found and not section.alone and not found[-1][0].alone:
            found[-1].append(section)
        else:
            found.append([section])
    return found


def wrong(texts: dict[str, str]) -> list[str]:
    """Names of the sections in which something did not hold."""
    return [name for name, text in texts.items() if BOLD in text]


def not_tried(asked: Iterable[Section], texts: dict[str, str]) -> list[str]:
    """Names of the sections that were asked for and not begun, or in which something was not tried."""
    return [one.name for one in asked if NOT_TRIED in texts.get(one.name, NOT_TRIED)]


def exit_code(asked: Iterable[Section], texts: dict[str, str]) -> int:
    """What was wrong counts more than what was not tried."""
    if wrong(texts):
        return WRONG
    return NOT_ALL_TRIED if not_tried(asked, texts) else HELD
