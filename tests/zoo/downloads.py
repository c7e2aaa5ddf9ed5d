"""Downloads, read by stock PEFT on the untouched base in a new process, beside what the trained model said."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.zoo.bases import KINDS
from tests.zoo.finding import BF16, EXACT, Finding, Tried

ROOT = Path(__file__).parents[2]


def read_downloads(tried: Sequence[Tried], folder: Path) -> None:
    """Read them all in one process, and write into each finding what came of it."""
    if not tried:
        return
    folder.mkdir(parents=True)
    readings = [
        {
            "base": str(one.base),
            "adapter": str(one.adapter),
            "precision": one.finding.case.precision,
            "attention": KINDS[one.finding.kind].attention,
            "rows": [row.tolist() for row in one.rows],
        }
        for one in tried
    ]
    (folder / "readings.json").write_text(json.dumps(readings))
    command = [sys.executable, "-m", "tests.zoo.stock", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    for number, one in enumerate(tried):
        found, failed = folder / f"{number}.safetensors", folder / f"{number}.error"
        if found.exists():
            _compare(one, load_file(found))
        else:
            why = failed.read_text() if failed.exists() else done.stderr or f"exit code {done.returncode}"
            _is_wrong(one.finding, f"Stock PEFT cannot read it: {why.strip().splitlines()[-1][:300]}")


def _compare(one: Tried, said: dict[str, Tensor]) -> None:
    rows = range(len(one.rows))
    read = torch.cat([said[f"{i}"] for i in rows])
    trained, before = torch.cat(one.trained), torch.cat(one.before)
    if one.finding.case.precision == "bf16":
        # By the middle token: a mixture routes some tokens differently in every two computations in bf16.
        exact = torch.cat([said[f"exact.{i}"] for i in rows])
        off, allowed = _middle(trained, exact), BF16 * _middle(read, exact)
        did = _middle(trained, before)
    else:
        off, allowed, did = _far(trained, read), EXACT, _far(trained, before)
    one.finding.numbers |= {"share": float(said["share"]), "logits": off, "allowed": allowed, "training did": did}
    if not off <= allowed:
        _is_wrong(one.finding, f"Stock PEFT's logits differ by {off:.2g} (allowed {allowed:.2g}).")
    elif not did > off:
        _is_wrong(one.finding, f"The training changed the logits by {did:.2g} only.")


def _is_wrong(finding: Finding, sentence: str) -> None:
    finding.verdict, finding.sentence = "wrong", sentence


def _far(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _middle(one: Tensor, other: Tensor) -> float:
    """The median token's relative difference."""
    return float(((one - other).norm(dim=1) / other.norm(dim=1)).median())
