"""Training steps at the shapes of real models: milliseconds, tokens, memory, kernels, syncs; beside PEFT's."""

import gc
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.day import SHAPES, Day, adapters, llama, rows
from lorainit.batches import pack
from lorainit.data import Sample
from lorainit.group import Stand
from lorainit.loss import tallies
from lorainit.model import attention
from lorainit.model.targets import linear_layers
from lorainit.optimizers import make_optimizer
from lorainit.recompute import recompute
from lorainit.spec import Hyperparameters

RANK = 16
# Dense bf16 operations per second that the makers state.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
HEAD = "| base | rows | who | ms a step | tokens/s | of peak | kernels | processor ms | peak GiB | syncs |"


@dataclass(frozen=True)
class Case:
    """Rows of one length in one pass; `again`: layers are computed again; `group`: adapters, each with such rows."""

    shape: str
    count: int
    length: int
    again: bool = False
    group: int = 1

    @property
    def rows(self) -> str:
        each = f"{self.group} adapters × " if self.group > 1 else ""
        return f"{each}{self.count} × {self.length}{', recomputed' if self.again else ''}"


STEPS = [
    Case("135M", 8, 256),
    Case("135M", 64, 256),
    Case("1B", 8, 512),
    Case("8B", 8, 512),
    Case("8B", 2, 4096, again=True),
]
GROUPS = [Case("135M", 1, 256, group=8), Case("1B", 1, 512, group=8), Case("8B", 1, 512, group=8)]
Step = Callable[[], tuple[float, float]]


def steps(day: Day) -> None:
    """One adapter: ours, ours as a job runs it by default, which has to repeat bit by bit, and PEFT.

    PEFT as HF Trainer runs it with bf16: autocast, sdpa, fused AdamW, rows padded.
    """
    _table(day, [Case("tiny", 4, 64)] if day.tiny else STEPS, [_ours, _deterministic, _peft])


def groups(day: Day) -> None:
    """Eight adapters in one pass beside one of them alone with rows of its own."""
    cases = [Case("tiny", 1, 64, group=2)] if day.tiny else GROUPS
    _table(day, [case for one in cases for case in (Case(one.shape, one.count, one.length), one)], [_ours])


def _table(day: Day, cases: Sequence[Case], contenders: Sequence[Any]) -> None:
    day.say(HEAD + "\n" + "|---" * HEAD.count(" | ") + "|---|")
    model, shape = None, ""
    for case in cases:
        for contender in contenders:
            if time.monotonic() > day.until:
                day.say(f"| {case.shape} | {case.rows} | {WHO[contender]} | not tried for lack of time |")
                continue
            if shape != case.shape or contender is _peft or case.again:
                model = None
                _free(day)
                model, shape = llama(case.shape, day.device, torch.bfloat16), case.shape
            try:
                found = _measured(day, case, model, contender)
            except Exception as error:
                found = f"**{type(error).__name__}: {' '.join(str(error).split())[:200]}** |"
            day.say(f"| {case.shape} | {case.rows} | {WHO[contender]} | {found}")
            if contender is _peft or case.again:
                shape = ""  # it has been changed


def _free(day: Day) -> None:
    gc.collect()
    if day.has_gpu:
        torch.cuda.empty_cache()


def _measured(day: Day, case: Case, model: Any, contender: Callable[[Day, Case, Any], Step]) -> str:
    step = contender(day, case, model)
    for _ in range(3):
        step()
    if day.has_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, busy = [], []
    for _ in range(3 if day.tiny else 7):
        day.wait()
        started, used = time.perf_counter(), time.thread_time()
        step()
        busy.append(time.thread_time() - used)
        day.wait()
        seconds.append(time.perf_counter() - started)
    best, tokens = sorted(seconds)[len(seconds) // 2], case.group * case.count * case.length
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if day.has_gpu else "–"
    return (
        f"{1e3 * best:.1f} | {tokens / best:,.0f} | {_share(case, model, best)} | {_kernels(day, step)} |"
        f" {1e3 * sorted(busy)[len(busy) // 2]:.1f} | {peak} | {_syncs(day, step)} |"
    )


def _share(case: Case, model: Any, seconds: float) -> str:
    """Operations that the step cannot do without, over what the device could do: no weight gradients but A's and B's.

    A product forward and one backward for every frozen matrix, the head for trained tokens only, causal attention.
    """
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((value for key, value in PEAK.items() if key in name), None)
    if peak is None:
        return "–"
    config, tokens = model.config, case.group * case.count * case.length
    frozen = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lora" not in n and "head" not in n]
    matrices = sum(m.weight.numel() for m in frozen) + config.vocab_size * config.hidden_size * 2 / 3
    attention_each = 6 * case.length * config.hidden_size * config.num_hidden_layers
    return f"{100 * (4 * matrices + attention_each) * tokens / seconds / peak:.0f} %"


def _kernels(day: Day, step: Step) -> str:
    if not day.has_gpu:
        return "–"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        day.wait()
    events = (e for e in profile.events() if e.device_type.name == "CUDA" and not e.name.startswith("Mem"))
    return f"{sum(1 for _ in events)}"


def _syncs(day: Day, step: Step) -> str:
    """How often the processor waited for the device."""
    if not day.has_gpu:
        return "–"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
    print("waits:", Counter(places).most_common(12), file=sys.stderr)
    return str(len(places))


# --- contenders -------------------------------------------------------------------------------------


def _ours(day: Day, case: Case, model: Any) -> Step:
    model.set_attn_implementation(attention.NAME)
    members = [adapters(model, rank=RANK, device=day.device) for _ in range(case.group)]
    optimizers = [make_optimizer(Hyperparameters(learning_rate=1e-4), layers) for layers in members]
    trained = [[p for layer in layers.values() for p in layer.trained().values()] for layers in members]
    if case.again:
        recompute(model)
    samples = [rows(case.count, case.length, SHAPES[case.shape]["vocab_size"]) for _ in members]
    counts = [sum(int(s.trained[1:].sum()) for s in some) for some in samples]
    spans = list(pairwise(accumulate([case.count * case.length] * case.group, initial=0)))
    stand = Stand(model)

    def step() -> tuple[float, float]:
        stand.put(members, spans)
        batch = pack([sample for some in samples for sample in some]).to(day.device)
        parts = tallies(model, batch, counts)
        torch.autograd.backward(torch.stack([p.loss / n for p, n in zip(parts, counts, strict=True)]).sum())
        for part, some, optimizer in zip(parts, trained, optimizers, strict=True):
            norm = nn.utils.clip_grad_norm_(some, 1.0)
            loss, found = torch.stack([part.loss.detach(), norm]).tolist()
            optimizer.step()
            optimizer.zero_grad()
        stand.clear()
        return loss, found

    return step


def _deterministic(day: Day, case: Case, model: Any) -> Step:
    step = _ours(day, case, model)
    debugging: Any = torch.utils.deterministic
    debugging.fill_uninitialized_memory = False

    def run() -> tuple[float, float]:
        torch.use_deterministic_algorithms(True)
        try:
            return step()
        finally:
            torch.use_deterministic_algorithms(False)

    return run


def _peft(day: Day, case: Case, model: Any) -> Step:
    from peft import LoraConfig, get_peft_model

    model.set_attn_implementation("sdpa")
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=_suffixes(model), task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, config)
    if case.again:
        adapted.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    samples = rows(case.count, case.length, SHAPES[case.shape]["vocab_size"])

    def step() -> tuple[float, float]:
        ids, labels = _padded(samples)
        with torch.autocast(day.device.type, torch.bfloat16) if day.has_gpu else nullcontext():
            loss = adapted(input_ids=ids.to(day.device), labels=labels.to(day.device), use_cache=False).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach()), float(norm)

    return step


def _suffixes(model: Any) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in linear_layers(model)})


def _padded(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.stack([s.ids for s in samples]).long()
    trained = torch.stack([s.trained for s in samples])
    return ids, ids.masked_fill(~trained, -100)


WHO = {_ours: "ours", _deterministic: "ours, deterministic", _peft: "PEFT"}
