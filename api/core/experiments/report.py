"""The report of an experiment: one HTML file that needs nothing else, with the table, curves, costs and the card."""

import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from api.core.experiments.experiments import Treatment
from api.core.experiments.ranking import Row
from api.core.experiments.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinguishable for people with the common kinds of colour blindness (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A00", "#000000")
AXES = (("step", "optimizer steps"), ("tokens", "tokens"), ("seconds", "seconds, initialization included"))
# The fields of a request, apart from its name.
ASKED = ("job", "grid", "objective", "schedule", "extend", "max_jobs", "confirm_seeds")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { text-align: right; padding: 0.3rem 0.6rem; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
.warning { border-left: 4px solid #D55E00; padding: 0.2rem 0.8rem; background: #fdf3ec; }
pre { background: #f4f4f4; padding: 0.8rem; overflow-x: auto; font-size: 0.85rem; }
svg { max-width: 100%; height: auto; }
"""


def make_report(found: Results, *, status: str) -> str:
    """The whole report as HTML. It can be made at any time; what has not ended yet is missing in it."""
    name, card = html.escape(found.experiment.name), found.card
    warnings = [] if card is None else card["warnings"]
    parts = [
        f"<h1>{name}</h1>",
        f"<p>Experiment {html.escape(found.experiment.id)}, {html.escape(status)}: {len(found.ended)} of"
        f" {len(found.cells)} jobs have ended.</p>",
        *(f'<p class="warning">{html.escape(_sentence(warning))}</p>' for warning in warnings),
        _list(found.summary or [found.experiment.request["plan"]]),
        "<h2>Initializations</h2>",
        _table(found),
    ]
    if found.confirmation is not None:
        parts += ["<h2>Leaders on fresh seeds</h2>", _list(found.confirmation.summary), _table(found.confirmation)]
    if found.curves:
        parts += ["<h2>Validation loss</h2>", "<p>Mean over seeds at each initialization's best learning rate;"]
        parts += ["the band is one standard deviation between seeds.</p>", _draw(_plot_curves, found)]
        parts += ["<h2>Learning rates and cost</h2>", _draw(_plot_rates_and_cost, found)]
    if card is not None:
        parts += ["<h2>Comparison card</h2>", f"<pre>{html.escape(json.dumps(card, indent=2))}</pre>"]
    if found.experiment.chooses_for is None:  # otherwise it is a part of that job, and cannot be asked for
        parts += ["<h2>To repeat it</h2>", f"<pre>{html.escape(_command(found))}</pre>"]
    head = f'<meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _table(found: Results) -> str:
    columns = (
        "rank", "initialization", "learning rate", "objective", "behind the best", "95 % interval", "final loss",
        "at equal tokens", "at equal seconds", "steps to baseline", "init s", "train s", "parameters", "download",
        "failed",
    )  # fmt: skip
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(found, row, position)) + "</tr>"
        for position, row in enumerate(found.ranking.rows, start=1)
    )
    return "<table><tr>" + "".join(f"<th>{column}</th>" for column in columns) + f"</tr>{rows}</table>"


def _cells(found: Results, row: Row, position: int) -> list[str]:
    cost, sizes, speed = found.find_cost(row), found.find_sizes(row), found.find_speed(row)
    name, difference, interval, losses = _name(found, row), row.difference, None, found.find_losses(row)
    if difference is not None:
        interval = difference.family_ci95
    tied = " (tied)" if row.tied_with_best and position > 1 else ""
    return [
        f"{position}{tied}",
        name,
        "" if row.learning_rate is None else f"{row.learning_rate:g}" + (" (edge)" if row.at_edge else ""),
        "" if row.summary is None else f"{row.summary.mean:.4f}" + _spread(row.summary.std),
        "" if difference is None else f"{difference.mean:.4f}",
        "" if interval is None else f"{interval.low:.4f} to {interval.high:.4f}",
        _number(losses["final"], 4),
        _number(losses.get("at_equal_tokens"), 4),
        _number(losses.get("at_equal_seconds"), 4),
        "" if speed["steps"] is None else f"{speed['steps']:.0%}",
        _number(cost["init_seconds"], 1),
        _number(cost["train_seconds"], 1),
        "" if sizes["trainable_parameters"] is None else f"{sizes['trainable_parameters']:,}",
        "" if sizes["adapter_bytes"] is None else f"{sizes['adapter_bytes'] / 1e6:.1f} MB, r {sizes['export_rank']}",
        str(row.failed_runs or ""),
    ]


def _name(found: Results, row: Row) -> str:
    return found.names[row.treatment]  # type: ignore[index]  # treatments of `Results` are pairs


def _spread(std: float | None) -> str:
    return "" if std is None else f" ± {std:.4f}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _command(found: Results) -> str:
    request = found.experiment.request
    body = {"name": found.experiment.name, **{name: request[name] for name in ASKED}}
    grid = {key: value for key, value in body["grid"].items() if value is not None}
    text = json.dumps({**body, "grid": grid}, indent=2)
    call = 'curl "$OPENAI_BASE_URL/experiments" -H "Authorization: Bearer $OPENAI_API_KEY"'
    return f"{call} \\\n  -H 'Content-Type: application/json' -d @- <<'END'\n{text}\nEND"


# --- pictures -------------------------------------------------------------------------------------


def _draw(plot: Any, found: Results) -> str:
    """A picture as SVG, without the program's own header and without times, so that equal results look equal."""
    import matplotlib as mpl  # here, because importing it takes a second
    from matplotlib.figure import Figure

    with mpl.rc_context(
        {"svg.hashsalt": "lorainit", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        plot(found, figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().partition("?>")[2].partition("<svg")[1] + text.getvalue().partition("<svg")[2]


def _colour(found: Results, treatment: Treatment) -> str:
    return COLOURS[sorted(found.names).index(treatment) % len(COLOURS)]


def _plot_curves(found: Results, figure: "Figure") -> None:
    for axes, (of, label) in zip(figure.subplots(1, len(AXES), sharey=True), AXES, strict=True):
        for row in found.ranking.rows:
            _plot_curve(found, row, axes, of)
        _plot_stopped(found, axes, of)
        axes.set_xlabel(label)
    figure.axes[0].set_ylabel("validation loss")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, max(1, len(labels))), frameon=False)


def _plot_curve(found: Results, row: Row, axes: "Axes", of: str) -> None:
    mine = [found.curves_with_start[row.treatment, row.learning_rate, seed] for seed in row.values]
    points = list(zip(*(_known(curve) for curve in mine), strict=False))
    if not points:
        return
    x = [fmean(point[of] for point in group) for group in points]
    y = [fmean(point["valid_loss"] for point in group) for group in points]
    colour = _colour(found, row.treatment)  # type: ignore[arg-type]  # treatments of `Results` are pairs
    axes.plot(x, y, color=colour, label=f"{_name(found, row)} at {row.learning_rate:g}", linewidth=1.4)
    if len(mine) > 1:
        bands = [stdev([point["valid_loss"] for point in group]) for group in points]
        low, high = [a - b for a, b in zip(y, bands, strict=True)], [a + b for a, b in zip(y, bands, strict=True)]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _plot_stopped(found: Results, axes: "Axes", of: str) -> None:
    """The runs that the schedule stopped, thin, one by one."""
    for cell in found.cells:
        key = (cell.init, cell.rank), cell.learning_rate, cell.seed
        points = _known(found.curves_with_start.get(key, ())) if cell.stopped_at is not None else []
        if points:
            x, y = [point[of] for point in points], [point["valid_loss"] for point in points]
            axes.plot(x, y, color=_colour(found, key[0]), linewidth=0.7, marker=".", markersize=3)


def _known(curve: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [point for point in curve if point["valid_loss"] is not None and math.isfinite(point["valid_loss"])]


def _plot_rates_and_cost(found: Results, figure: "Figure") -> None:
    left, right = figure.subplots(1, 2)
    for row in found.ranking.rows:
        colour = _colour(found, row.treatment)  # type: ignore[arg-type]  # treatments of `Results` are pairs
        means = [(rate, summary) for rate, summary in row.by_rate.items() if summary is not None]
        spreads = [summary.std or 0.0 for _, summary in means]
        left.errorbar(
            [rate for rate, _ in means], [summary.mean for _, summary in means], yerr=spreads, color=colour,
            marker="o", markersize=3, linewidth=1.2, label=_name(found, row),
        )  # fmt: skip
        cost = found.find_cost(row)
        if row.summary is not None and cost["train_seconds"] is not None:
            seconds = cost["train_seconds"] + (cost["init_seconds"] or 0.0)
            right.errorbar([seconds], [row.summary.mean], yerr=[row.summary.std or 0.0], color=colour, marker="o")
    left.set_xscale("log")
    left.set_xlabel("learning rate")
    left.set_ylabel("objective")
    right.set_xlabel("seconds of a run, initialization included")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(8, max(1, len(labels))), frameon=False)
