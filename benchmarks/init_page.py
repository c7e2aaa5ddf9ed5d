"""The page that `bench_init.py` writes: the tables, the goals with what was measured, and why some are missed."""

import argparse
import platform
from typing import Any

from benchmarks.init_cases import LAYER, LONG

WHY = """\
Why some are missed, in the order of the table:

- **LoRA-One.** Decomposing 210 gradients takes longer than 15 % of eight rows of 88 tokens. The passes grow with the
  tokens, the decompositions do not: the rows of 512 tokens stay below.
- **PiSSA.** SmolLM2's matrices are at most 576 on the shorter side, where a full SVD costs tens of milliseconds and a
  randomized one is bound by its passes over W; ours goes on until it is exact. A layer as wide as those of a 7B model
  is another matter. The one here is random, without any gap in its spectrum: the worst case for five iterations.
- **The gradients.** [log.md](../log.md) has the experiments, none of them faster than about seven times.
- **Memory.** What a method has seen lies in main memory, off an accelerator, and here main memory is all there is.
  Gradients are as large as the adapted weights (405 MiB), CorDA's second moments in² for every input. The rest is the
  activations of the passes over the rows, and with HRP an adapter of rank R: factors, gradients and two moments."""


def report(found: dict[tuple[str, str, str], dict[str, Any]], args: argparse.Namespace) -> str:
    import peft
    import torch

    lines = [
        "# What an initialization costs",
        "",
        f"`make bench-init`, rank {args.rank}, float32, one core of an {platform.machine()} machine, no GPU,"
        f" torch {torch.__version__}, PEFT {peft.__version__}.",
        "Each line is one process; seconds are processor time. Read ratios within a table: another machine, more cores",
        "or a GPU move every number. Memory is the peak above what the process held before. What took longer than"
        f" {args.limit:g} s",
        "by the clock, loading included, was ended.",
    ]
    if args.results:
        lines += ["The lines come from several calls of the command (`--results`) on one machine, one after the other."]
    titles = {
        "model": "SmolLM2-135M: 210 matrices, 106 M weights, evidence included",
        "layer": f"One {LAYER[0]}×{LAYER[1]} layer, evidence given",
    }
    for setting, title in titles.items():
        rows = {key: row for key, row in found.items() if key[0] == setting}
        if not rows:
            continue
        lines += [
            "",
            f"## {title}",
            "",
            "| method | by | seconds | evidence | decomposition or draw | extra memory, MiB | ‖sBA‖²/‖W‖² |",
            "|---|---|---|---|---|---|---|",
        ]
        for (_, who, name), row in rows.items():
            by = "Lorainit" if who == "ours" else "stock PEFT"
            if "skipped" in row:
                lines.append(f"| {name} | {by} | {row['skipped']} | | | | |")
            else:
                parts = " | ".join(
                    f"{row[part]:.3g}" if row.get(part, 0) > 1e-4 else "" for part in ("evidence", "method")
                )
                memory = f"{row['bytes'] / 2**20:.0f}"
                lines.append(f"| {name} | {by} | {row['seconds']:.3g} | {parts} | {memory} | {row['energy']:.3g} |")
    lines += ["", "## Goals", "", "| goal | measured | |", "|---|---|---|"]
    return "\n".join([*lines, *goals(found, args), "", WHY]) + "\n"


def goals(found: dict[tuple[str, str, str], dict[str, Any]], args: argparse.Namespace) -> list[str]:
    def get(setting: str, who: str, name: str, field: str = "seconds") -> float | None:
        return found.get((setting, who, name), {}).get(field)

    lines = []

    def goal(text: str, value: float | None, limit: float, told: str, *, at_least: bool = False) -> None:
        if value is None:
            lines.append(f"| {text} | not measured: {told} | – |")
        else:
            met = value >= limit if at_least else value <= limit
            lines.append(f"| {text} | {told} | **{'met' if met else 'missed'}** |")

    for setting, field in (("layer", "seconds"), ("model", "method")):
        mine, copy = get(setting, "ours", "loram", field), get(setting, "ours", "loram", "copy")
        ratio = mine / copy if mine and copy else None
        told = f"{ratio:.2f}× ({mine:.3g} s against {copy:.3g} s)" if ratio else "loram skipped"
        whole = get("model", "ours", "loram")
        if setting == "model" and whole and copy:
            told += f"; with checks, report and new layers, which all methods have: {whole / copy:.2f}×"
        goal(f"LoRAM ≤ 1.5× one read and one write of the weights, {setting}", ratio, 1.5, told)
    for name in ("lora_one", LONG):
        passes, mine = (get("model", "ours", name, field) for field in ("passes", "gradients"))
        cold, whole = get("model", "ours", name, "evidence"), get("model", "ours", name)
        ratio = rest = None
        told = all_told = "skipped"
        if passes and mine and cold and whole:
            ratio, rest = mine / passes, (mine + whole - cold) / passes
            told = f"{ratio:.2f}× ({mine:.3g} s against {passes:.3g} s, in memory that was touched before)"
            all_told = f"{rest:.2f}× ({whole - cold:.2g} s more)"
        goal(f"{name}: gradients ≤ 1.15× its 8 forward and backward passes", ratio, 1.15, told)
        goal(f"{name}: with decompositions, report and layers", rest, 1.15, all_told)
    for setting, name in [(s, n) for s in ("model", "layer") for n in ("pissa", "pissa (niter 5)")]:
        mine, theirs = get(setting, "ours", name), get(setting, "peft", "pissa")
        energy, best = (get(setting, "ours", name, field) for field in ("energy", "best"))
        ratio, told = None, "pissa skipped"
        if mine and energy and best:
            off, ended = 100 * (1 - energy / best), theirs is not None
            ratio = (theirs or args.limit) / mine if off <= 0.5 else 0.0
            against = f"{theirs:.3g} s" if theirs else f"more than {args.limit:g} s"
            told = f"{'' if ended else '> '}{(theirs or args.limit) / mine:.1f}×, energy {off:.2f} % below the best"
            told += f" ({mine:.3g} s against {against})"
        text = f"{name} ≥ 10× faster than PEFT's full SVD, energy within 0.5 %, {setting}"
        goal(text, ratio, 10, told, at_least=True)
    one, two, exact = (get("model", "ours", "lora_one", f) for f in ("top_quick", "top_peft", "top_ours"))
    energy = get("model", "ours", "lora_one", "top_energy")
    told = "lora_one skipped"
    if one and two and exact and energy:
        told = f"{two / one:.1f}×, {100 * energy:.2f} % ({one:.3g} s against {two:.3g} s); all of it, as methods do:"
        told += f" {two / exact:.1f}×"
    ratio = two / one if one and two and energy and energy >= 0.999 else None if not energy else 0.0
    text = "Top-16 of the 210 gradients, ≥ 99.9 % of the best energy, ≥ 10× faster than with PEFT LoRA-GA's settings"
    goal(text, ratio, 10, told, at_least=True)
    # Factors and their copies, and eight times the largest layer, are what "one layer's temporaries" may come to.
    allowed = 2**20 * (100 + 8 * 4 * 1536 * 576 / 2**20)
    above = {
        name: row["bytes"] for (setting, who, name), row in found.items()
        if setting == "model" and who == "ours" and row.get("bytes", 0) > allowed
    }  # fmt: skip
    told = ", ".join(f"{n} {b / 2**20:.0f} MiB" for n, b in above.items()) or "all below"
    goal(
        f"No method needs more than the base, its factors and one layer's temporaries ({allowed / 2**20:.0f} MiB)",
        len(above), 0, told,
    )  # fmt: skip
    return lines
