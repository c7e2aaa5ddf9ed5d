"""Draws a job's result file (step_metrics.csv): training loss, and the loss on the validation rows.

python examples/loss_curve.py step_metrics.csv loss.png
"""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main(source: Path, target: Path) -> None:
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for column, label, style in (
        ("train_loss", "training", {"linewidth": 1}),
        ("full_valid_loss", "validation", {"marker": "o"}),
    ):
        points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss (nats per trained token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
