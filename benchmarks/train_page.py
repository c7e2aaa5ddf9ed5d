"""The figures of `bench_train.py` as a section of docs/speed.md: tables, goals, settings, machine."""

import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.train_figures import MIB, Goal, Row, by_round, goals, ratio, speed
from benchmarks.train_plan import CURVE, NAMES, QUALITY, ROUND, TRYOUTS, Work
from benchmarks.train_quality import make_table

Key = tuple[str, str, int]
ISA = {"amx_bf16": "AMX with bf16", "avx512_bf16": "AVX-512 with bf16", "avx512f": "AVX-512", "avx2": "AVX2"}


def section(page: Path, name: str) -> tuple[str, str]:
    """What stands before and after the figures: all up to `<!-- name -->`, and from `<!-- /name -->` on.

    Raises:
        ValueError: the page has no such place.
    """
    before, opening, rest = page.read_text().partition(f"<!-- {name} -->\n")
    _, closing, after = rest.partition(f"<!-- /{name} -->")
    if not opening or not closing:
        raise ValueError(f"{page} has no place for {name}.")
    return before + opening, closing + after


def write_section(page: Path, name: str, text: str) -> None:
    """Put `text` between the two marks, in place of the figures of before; the rest of the page is written by hand."""
    before, after = section(page, name)
    page.write_text(f"{before}\n{text.strip()}\n\n{after}")


def report(found: dict[Key, Row], work: Work, *, warmup: int, threads: int | None) -> str:
    """Everything that the page shows of one run of the benchmark."""
    runs: dict[str, dict[int, Row]] = {}
    for (part, name, number), row in found.items():
        if part == "round" and "skipped" not in row:
            runs.setdefault(name, {})[number] = row
    curve = {name: row for (part, name, _), row in found.items() if part == CURVE and "skipped" not in row}
    rounds = max((len(rows) for rows in runs.values()), default=0)
    parts = [
        [_headline(found.values(), work, warmup=warmup, threads=threads, rounds=rounds)],
        ["### Speed, memory, loss", "", *_speeds(runs, warmup=warmup), *_skipped(found)],
        ["### Goals", "", *_goals(goals(runs, curve, warmup=warmup))],
        [
            "### Time to quality",
            "",
            *make_table({name: row for (part, name, _), row in found.items() if part == QUALITY}),
        ],
        ["### Competitors' settings, tried before the rounds", "", *_tryouts(found, warmup=warmup)],
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def _headline(rows: Iterable[Row], work: Work, *, warmup: int, threads: int | None, rounds: int) -> str:
    versions: dict[str, str] = next((row["versions"] for row in rows if "versions" in row), {})
    told = ", ".join(f"{name} {version}" for name, version in versions.items()) or "no competitor ran"
    return (
        f"Measured {datetime.now(UTC):%Y-%m-%d} on {machine()}{f', threads: {threads}' if threads else ''}. Versions:"
        f" {told}, Python {platform.python_version()}.\n"
        f"{rounds} rounds of {work.steps} steps of {work.batch} rows, of which {warmup} warm up."
    )


def machine() -> str:
    """Cores, processor, instructions and memory, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    isa = next((told for flag, told in ISA.items() if flag in flags), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {facts.get('model name', platform.machine())} ({isa}), {memory:.0f} GiB, no GPU"


# --- tables ------------------------------------------------------------------------------------

_COLUMNS = [
    "", "useful tok/s", "median step (quartiles)", "all tok/s", "Lorainit bf16 is faster",
    "peak MiB until the last step", "whole process", "held-out loss", "s to first step",
]  # fmt: skip


def _speeds(runs: dict[str, dict[int, Row]], *, warmup: int) -> list[str]:
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    mine = by_round(runs, "ours-bf16", "useful", warmup=warmup)
    for name in [*ROUND, *(name for name in NAMES if name not in ROUND)]:
        if name in runs:
            rows = runs[name]
            faster = ratio(mine, by_round(runs, name, "useful", warmup=warmup))
            lines.append(f"| {NAMES[name]} | " + " | ".join(_cells(rows, str(faster or "–"), warmup=warmup)) + " |")
    return lines


def _cells(rows: dict[int, Row], faster: str, *, warmup: int) -> list[str]:
    """One contender's figures, all of its round of median speed."""
    row = sorted(rows.values(), key=lambda row: speed(row, warmup=warmup).useful)[(len(rows) - 1) // 2]
    found = speed(row, warmup=warmup)
    judged = next((f"{row['held_out']:.3f}" for row in rows.values() if "held_out" in row), "–")
    return [
        f"{found.useful:.0f}",
        f"{found.step:.0f} ({found.quartiles[0]:.0f}–{found.quartiles[1]:.0f})",
        f"{found.all:.0f}",
        faster,
        f"{row['peak_training'] / MIB:.0f}",
        f"{row['peak'] / MIB:.0f}",
        judged,
        f"{row['first_step']:.0f}",
    ]


def _skipped(found: dict[Key, Row]) -> list[str]:
    """What took part in a round or the curve and did not get to its end."""
    failed = [(NAMES.get(name, f"curve, {name}"), row["skipped"]) for (part, name, _), row in found.items()
              if part in ("round", CURVE) and "skipped" in row]  # fmt: skip
    return ["", *(f"- {name}: not measured, {why}" for name, why in failed)] if failed else []


def _goals(found: list[Goal]) -> list[str]:
    told = {True: "**met**", False: "**missed**", None: "–"}
    return ["| goal | measured | |", "|---|---|---|", *(f"| {g.text} | {g.told} | {told[g.met]} |" for g in found)]


def _tryouts(found: dict[Key, Row], *, warmup: int) -> list[str]:
    lines = ["| | setting | useful tok/s | all tok/s | peak MiB | |", "|---|---|---|---|---|---|"]
    for name, candidates in TRYOUTS.items():
        rows = {setting: found[name, setting, 0] for setting in candidates if (name, setting, 0) in found}
        speeds = {k: speed(row, warmup=warmup) for k, row in rows.items() if "skipped" not in row}
        best = max(speeds, key=lambda k: speeds[k].useful, default=None)
        for setting, row in rows.items():
            if setting in speeds:
                figures = f"{speeds[setting].useful:.0f} | {speeds[setting].all:.0f} | {row['peak'] / MIB:.0f}"
            else:
                figures = f"{row['skipped']} | |"
            taken = "taken" if setting == best else ""
            lines.append(f"| {NAMES[name]} | {setting} | {figures} | {taken} |")
    return lines
