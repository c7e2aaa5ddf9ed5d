"""`lorainit compare`: what it asks of a server, and what it prints."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from api.cli import client as remote
from api.cli import commands, compare
from api.cli.client import Problem


def test_every_tenth_row_is_kept_for_validation(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(f"{number}\n\n" for number in range(1, 26)) + "26")
    train, held_out = tmp_path / "train", tmp_path / "valid"
    assert compare._split_rows(source, train, held_out) == 2
    assert held_out.read_text().split() == ["10", "20"]
    assert train.read_text().splitlines() == [str(n) for n in range(1, 27) if n not in (10, 20)]


def test_too_few_rows_to_keep_some_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("1\n2\n")
    with pytest.raises(Problem, match="--validation"), compare._validation_rows(source, None):
        pass


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["kaiming,pissa"], ["kaiming", "pissa"]),
        (["kaiming", '{"method": "pissa", "niter": 4}'], ["kaiming", '{"method": "pissa", "niter": 4}']),
        ([" kaiming , loram,"], ["kaiming", "loram"]),
    ],
)
def test_initializations_are_separated_by_commas_or_given_as_json(given: list[str], expected: list[str]) -> None:
    assert compare._split_inits(given) == expected


class FakeServer:
    """Answers like a server whose experiment has ended already."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    def post(self, path: str, *, body: dict[str, Any], cast_to: Any) -> Any:
        self.bodies.append(body)
        return {"id": "exp_1", "plan": "With 3 seeds, a difference of 4.0 times the noise is found."}

    def get(self, path: str, *, cast_to: Any) -> Any:
        return "<html></html>" if path.endswith("/report") else EXPERIMENT


ROW = {
    "rank": 1, "name": "pissa", "learning_rate": 2e-4, "learning_rate_at_edge": True, "tied_with_best": True,
    "objective": {"mean": 1.5, "std": 0.01}, "difference_to_best": None, "to_baseline_loss": {"steps": 0.61},
    "cost": {"init_seconds": 1.0, "train_seconds": 20.0}, "adapter_bytes": 19_000_000, "export_rank": 32,
}  # fmt: skip
EXPERIMENT = {
    "id": "exp_1", "status": "succeeded", "results": [ROW], "summary": ["pissa reaches kaiming's final loss in 61%."],
    "card": {"warnings": ["every best learning rate lies at the edge"]},
    "job_counts": {"total": 1, "queued": 0, "running": 0, "succeeded": 1, "failed": 0, "cancelled": 0},
}  # fmt: skip


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    fake = FakeServer()
    monkeypatch.setattr(remote, "connect", lambda: fake)
    monkeypatch.setattr(remote, "upload", lambda client, path: f"file-{path.name}")
    return fake


def run(*arguments: str) -> Any:
    return CliRunner().invoke(commands.app, list(arguments))


def test_a_comparison_is_ordered_shown_and_reported(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}\n" * 30)
    done = run("compare", "rows.jsonl", "-m", "base", "--init", "kaiming,pissa", "--rates", "1e-4,2e-4", "--steps", "9")
    assert done.exit_code == 0, done.output
    (body,) = server.bodies
    assert body["grid"] == {"init": ["kaiming", "pissa"], "learning_rates": [1e-4, 2e-4], "seeds": [1, 2, 3]}
    assert body["job"]["method"]["supervised"]["hyperparameters"] == {"max_steps": 9}
    assert (body["job"]["training_file"], body["job"]["validation_file"]) == (
        "file-rows.jsonl", "file-validation-rows.jsonl",
    )  # fmt: skip
    for text in ("exp_1", "0.0002!", "61%", "pissa reaches kaiming's final loss", "every best learning rate"):
        assert text in done.output
    assert Path("exp_1.html").read_text() == "<html></html>"


def test_an_experiment_may_be_left_to_itself(server: FakeServer, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n" * 30)
    done = run("compare", str(rows), "-m", "base", "--init", "kaiming", "--detach", "--r", "8,16")
    assert done.exit_code == 0 and "exp_1" in done.output
    (body,) = server.bodies
    assert body["grid"]["ranks"] == [8, 16] and body["grid"]["learning_rates"] == "auto"
    assert (body["schedule"], body["extend"], body["confirm_seeds"], "max_jobs" in body) == ("full", False, 0, False)


def test_a_comparison_may_stop_early_grow_and_be_confirmed(server: FakeServer, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n" * 30)
    more = ("--halving", "--extend", "--confirm", "2", "--most", "40")
    done = run("compare", str(rows), "-m", "base", "--init", "kaiming", "--detach", *more)
    assert done.exit_code == 0, done.output
    (body,) = server.bodies
    assert (body["schedule"], body["extend"], body["confirm_seeds"], body["max_jobs"]) == ("halving", True, 2, 40)


def test_a_rate_that_is_no_number_is_refused(server: FakeServer, tmp_path: Path) -> None:
    done = run("compare", str(tmp_path / "x"), "-m", "base", "--init", "kaiming", "--r", "eight")
    assert done.exit_code == 1 and "--r must be numbers" in done.output
    assert server.bodies == []
