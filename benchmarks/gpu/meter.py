"""What a training step takes, whoever drives it: milliseconds, processor time, memory, kernels, waits."""

import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.day import Day

# Dense bf16 operations per second that the makers state.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
WARM = 3  # steps before those that are timed


class Meter:
    """Measures `steps` steps, each entered as `with meter.step():`, from its rows until the device has done it.

    A few steps warm up, then some are timed; on a GPU the kernels of one more are counted, and the waits of another.
    """

    def __init__(self, day: Day) -> None:
        self.day, self.done = day, 0
        self.timed = 3 if day.tiny else 7
        self.steps = WARM + self.timed + (2 if day.has_gpu else 0)
        self.seconds: list[float] = []
        self.busy: list[float] = []
        self.kernels = self.waits = self.peak = "–"

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step."""
        self.day.wait()
        started, used = time.perf_counter(), time.thread_time()
        with self._looking():
            yield
        busy = time.thread_time() - used
        self.day.wait()
        if WARM <= self.done < WARM + self.timed:
            self.seconds.append(time.perf_counter() - started)
            self.busy.append(busy)
        self.done += 1

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """What is done beside the step, by its number."""
        if self.day.has_gpu and self.done == WARM:
            torch.cuda.reset_peak_memory_stats()
        if self.done < WARM + self.timed:
            yield
        elif self.done == WARM + self.timed:
            self.peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                yield
                self.day.wait()
            self.kernels = str(sum(1 for e in profile.events() if _is_kernel(e)))
        else:
            with _waits() as found:
                yield
            self.waits = str(len(found))

    def cells(self, *, tokens: int, operations: float) -> str:
        """The rest of a table's row, of a step with so many tokens that cannot do without so many operations."""
        if len(self.seconds) < self.timed:
            raise RuntimeError(f"{self.done} steps were made of the {self.steps} that were to be measured")
        seconds = median(self.seconds)
        return (
            f"{1e3 * seconds:.1f} | {tokens / seconds:,.0f} | {_share(operations / seconds)} | {self.kernels} |"
            f" {1e3 * median(self.busy):.1f} | {self.peak} | {self.waits} |"
        )


def _is_kernel(event: Any) -> bool:
    return event.device_type.name == "CUDA" and not event.name.startswith("Mem")


@contextmanager
def _waits() -> Iterator[list[str]]:
    """The places where the processor waited for the device; most of the frequent ones go to the section's log."""
    places: list[str] = []
    with ExitStack() as exits:
        caught = exits.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        exits.callback(torch.cuda.set_sync_debug_mode, "default")
        yield places
    places += [f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
    print("waits:", Counter(places).most_common(12), file=sys.stderr)


def _share(per_second: float) -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((value for key, value in PEAK.items() if key in name), None)
    return "–" if peak is None else f"{100 * per_second / peak:.0f} %"


def operations(model: Any, *, tokens: int, length: int) -> float:
    """What a step of `tokens` tokens in rows of `length` cannot do without: no weight gradients but A's and B's.

    A product forward and one backward for every frozen matrix, the head for trained tokens only, causal attention.
    """
    config = model.config
    frozen = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lora" not in n and "head" not in n]
    matrices = sum(m.weight.numel() for m in frozen) + config.vocab_size * config.hidden_size * 2 / 3
    attention = 6 * length * config.hidden_size * config.num_hidden_layers
    return float(4 * matrices + attention) * tokens
