"""The cases: initializations, options, resumed runs and groups, as `make gpu-day` has them for a real GPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

from benchmarks.gpu.day import Day
from benchmarks.gpu.jobs import OPTIMIZERS, Jobs, _grouped, _resumed, laid
from lorainit.events import Event, Metrics
from lorainit.inits import INITS
from lorainit.run import run
from tests.pretended import device
from tests.pretended.device import NAME
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
        "a sum without an order": lambda: x.cumsum(0),
    }
    taken = [name for name, attempt in attempts.items() if not _is_refused(attempt)]
    return f"it takes {', '.join(taken)}" if taken else "all refused"


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


def _step(day: Day) -> str:
    """What one step of a run costs, between the metrics of the second and of the third: launches, and waits."""
    jobs, seen = Jobs(day), list[tuple[int, int]]()

    def note(event: Event) -> None:
        if isinstance(event, Metrics):
            seen.append((device.tally().launches, device.tally().waits))

    run(jobs.spec(training={"batch_size": 4, "checkpoint_interval": 100}), day.folder / "out", note)
    (launches, waits), (more_launches, more_waits) = seen[1:3]  # packed rows, all in one pass
    return f"{more_launches - launches} launches and {more_waits - waits} waits"


CASES: dict[str, Case] = {
    "step": _step,
    "refusals": _refusals,
    **{f"resume {name}": partial(_goes_on, training={"optimizer": asked}) for name, asked in OPTIMIZERS.items()},
    "resume DoRA": partial(_goes_on, lora={"use_dora": True}),
    **{name: partial(_ends, lora={"init": name, "r": 4}) for name in INITS if name != "loftq"},
    "loram in fp32": partial(_ends, lora={"init": "loram", "r": 4}, precision="fp32"),
    "gpt2": partial(_ends, base="gpt2"),
    "dropout": partial(_ends, lora={"dropout": 0.1}),
    "gradient checkpointing": partial(_ends, training={"gradient_checkpointing": True}),
    "heads of 20": partial(_ends, base="narrow"),
    "heads of 20 in fp32": partial(_ends, base="narrow", precision="fp32"),
    "group": lambda day: _grouped(Jobs(day)),
}
