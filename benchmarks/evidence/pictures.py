"""The pictures of docs/evidence.md as SVG. They have a light card of their own, so any background is fine."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from api.core.experiments.ranking import Ranking, Row
from benchmarks.evidence.evidence import Evidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CARD, INK, REFERENCE, MAIN = "#fafafa", "#1f2937", "#9ca3af", "#0072b2"
BASELINE = "kaiming"
COLUMNS = 4  # of small pictures in a row
Plot = Callable[[Evidence, Ranking, "Figure"], None]


def draw_pictures(evidence: Evidence, folder: Path) -> list[str]:
    """Write the pictures of the main experiment; the names of those for which there is enough."""
    ranking = evidence.rank([evidence.studies[0].key])
    if not any(row.summary for row in ranking.rows):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    for name, (plot, height) in PICTURES.items():
        (folder / f"{name}.svg").write_text(_render(plot, evidence, ranking, height))
    return list(PICTURES)


def _render(plot: Plot, evidence: Evidence, ranking: Ranking, height: float) -> str:
    """Without times and random names, so that equal results give equal files."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.hashsalt": "lorainit", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": CARD,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, height), layout="constrained", facecolor=CARD)
        plot(evidence, ranking, figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    lines = text.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _plot_order(_evidence: Evidence, ranking: Ranking, figure: "Figure") -> None:
    """Every initialization at its best rate: the mean, each seed, and the interval of its distance to the best."""
    axes = figure.subplots()
    rows = [row for row in ranking.rows if row.summary is not None][::-1]
    first = ranking.rows[0]
    for place, row in enumerate(rows):
        assert row.summary is not None
        axes.plot(list(row.values.values()), [place] * len(row.values), "|", color=REFERENCE, markersize=9)
        interval = row.difference.family_ci95 if row.difference else None
        if interval is not None and first.summary is not None:
            low, high = first.summary.mean + interval.low, first.summary.mean + interval.high
            axes.plot([low, high], [place, place], color=MAIN, linewidth=1.4)
        axes.plot([row.summary.mean], [place], "o", color=MAIN, markersize=5)
    axes.set_yticks(range(len(rows)), [f"{row.treatment} at {row.learning_rate:g}" for row in rows])
    axes.set_xlabel("best validation loss (dot: mean, bar: 95 % interval beside the best, strokes: seeds)")


def _plot_rates(evidence: Evidence, ranking: Ranking, figure: "Figure") -> None:
    """The loss of each initialization by learning rate, with kaiming's in grey behind it.

    What ends worse than the untrained base is cut off, because it would flatten everything else.
    """
    reference, start = _find(ranking, BASELINE), evidence.find_start(BASELINE)

    def plot(axes: "Axes", row: Row) -> None:
        for one, colour in ((reference, REFERENCE), (row, MAIN)):
            means = [(rate, found.mean) for rate, found in one.by_rate.items() if found is not None] if one else []
            axes.plot([rate for rate, _ in means], [mean for _, mean in means], "o-", color=colour, markersize=3)
        axes.set_xscale("log")

    _plot_small(ranking.rows, figure, plot, "learning rate", "best validation loss")
    if start is not None:
        first = figure.axes[0]
        first.set_ylim(top=min(first.get_ylim()[1], start))  # of all, because they share it


def _plot_curves(evidence: Evidence, ranking: Ranking, figure: "Figure") -> None:
    """The loss of each initialization by step at its best rate, with kaiming's in grey behind it."""
    reference = _find(ranking, BASELINE)

    def plot(axes: "Axes", row: Row) -> None:
        for one, colour in ((reference, REFERENCE), (row, MAIN)):
            curves = (
                [evidence.curves[str(one.treatment), one.learning_rate, seed] for seed in one.values] if one else []
            )
            points = list(zip(*curves, strict=False))
            steps = [group[0]["step"] for group in points]
            axes.plot(steps, [fmean(point["valid_loss"] for point in group) for group in points], color=colour)

    _plot_small(ranking.rows, figure, plot, "optimizer steps", "validation loss")


def _plot_small(rows: Sequence[Row], figure: "Figure", plot: Callable[["Axes", Row], None], x: str, y: str) -> None:
    """One small picture for each initialization, all on the same axes."""
    shown = [row for row in rows if row.summary is not None]
    height = -(-len(shown) // COLUMNS)
    grid = figure.subplots(height, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, row in zip(grid, shown, strict=False):
        plot(axes, row)
        axes.set_title(str(row.treatment), fontsize=9)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)


def _plot_cost(evidence: Evidence, ranking: Ranking, figure: "Figure") -> None:
    """The loss of each initialization against the seconds of its own start."""
    axes = figure.subplots()
    for row in ranking.rows:
        seconds = evidence.find_seconds(str(row.treatment), "initializing")
        if row.summary is not None and seconds is not None:
            axes.plot([seconds], [row.summary.mean], "o", color=MAIN)
            axes.annotate(str(row.treatment), (seconds, row.summary.mean), (5, 3), textcoords="offset points")
    axes.set_xlabel("seconds of the initialization (median)")
    axes.set_ylabel("best validation loss")


def _find(ranking: Ranking, name: str) -> Row | None:
    return next((row for row in ranking.rows if row.treatment == name and row.summary is not None), None)


PICTURES: dict[str, tuple[Plot, float]] = {
    "order": (_plot_order, 3.6),
    "rates": (_plot_rates, 5.0),
    "curves": (_plot_curves, 5.0),
    "cost": (_plot_cost, 3.2),
}
