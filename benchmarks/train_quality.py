"""Time to quality: seconds until the held-out loss that TRL's defaults have at their end, for each initialization.

Part of `bench_train.py`. Seconds are counted from the start of the process, with loading, tokenizing and the
initialization; what a run spends on its evaluations after the first step is left out, since nobody needs so many.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.train_child import Failed, Place, helper, rival, run_ours
from benchmarks.train_plan import DEFAULTS, Work, quality_spec

RIVAL = "trl-defaults"
GOAL = 1 / 3
Row = dict[str, Any]


def measure_rival(work: Work, place: Place, out: Path) -> Row:
    """TRL with its defaults to its end: seconds since its process was started, and its held-out loss."""
    row = rival(work, DEFAULTS[RIVAL], place, out)
    loss = helper("train_judge.py", place.rows / "base", place.rows / "valid.json", row["adapter"])
    return {"seconds": row["first_step"] + sum(row["seconds"][1:]), "loss": float(loss)}


def measure_init(work: Work, init: str, place: Place, out: Path) -> Row:
    """One of our initializations with its recommended recipe: its held-out loss by seconds.

    The adapter is judged by the judge of the rival's, too: in another format than the run's own evaluations.
    """
    wanted = quality_spec(
        work, init, base=(place.rows / "base").resolve(), rows=place.rows.resolve(), cache=out / "cache"
    )
    seen, started = run_ours(wanted, place, out)
    adapter = seen[-1]["adapter"]
    judged = helper("train_judge.py", place.rows / "base", place.rows / "valid.json", adapter)
    return {"curve": read_curve(seen, started), "judged": float(judged)}


def read_curve(events: list[Row], started: float) -> list[tuple[float, float]]:
    """(seconds since the process was started, held-out loss) of each evaluation after step 0.

    Raises:
        Failed: the run told no step.
    """
    metrics = [event for event in events if event["kind"] == "metrics"]
    first = next((event for event in metrics if event["step"] == 1 and event["train_loss"] is not None), None)
    if first is None:
        raise Failed("it told no first step")
    before = first["at"] - started - first["seconds"]  # until training begins
    evaluated = [event for event in metrics if event["step"] > 0 and event.get("full_valid_loss") is not None]
    return [(before + event["seconds"], event["full_valid_loss"]) for event in evaluated]


def find_seconds(curve: list[tuple[float, float]], loss: float) -> float | None:
    """Seconds until a loss, on the line between two evaluations; None if it is not reached."""
    before: tuple[float, float] | None = None
    for seconds, value in curve:
        if value <= loss:
            if before is None or before[1] == value:
                return seconds
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (seconds - before[0])
        before = seconds, value
    return None


def make_table(rows: Mapping[str, Row]) -> list[str]:
    """The page's lines: the rival's seconds and loss, and each initialization's share of these seconds, best first.

    Args:
        rows: the measurements by name, the rival's among them.
    """
    theirs = rows.get(RIVAL, {})
    if "loss" not in theirs:
        return ["Not measured."]
    found = []
    for init, row in rows.items():
        if row.get("curve"):
            seconds = find_seconds(row["curve"], theirs["loss"])
            found.append((float("inf") if seconds is None else seconds / theirs["seconds"], init, row))
    lines = [
        f"TRL's defaults end after {theirs['seconds']:.0f} s with a held-out loss of {theirs['loss']:.4f}."
        f" Goal: that loss in {GOAL:.0%} of the time.",
        "",
        "| initialization | time to that loss, in TRL's | seconds | its own last loss | by stock PEFT in fp32 | goal |",
        "|---|---|---|---|---|---|",
    ]
    for share, init, row in sorted(found, key=lambda one: one[:2]):
        reached = share < float("inf")
        told = f"{share:.2f} | {share * theirs['seconds']:.0f}" if reached else "not reached | –"
        verdict = "**met**" if share <= GOAL else "**missed**"
        lines.append(f"| `{init}` | {told} | {row['curve'][-1][1]:.4f} | {row['judged']:.4f} | {verdict} |")
    skipped = [f"- `{name}`: not measured, {row['skipped']}" for name, row in rows.items() if "skipped" in row]
    return [*lines, *([""] if skipped else []), *skipped]
