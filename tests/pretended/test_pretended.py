"""Whole runs on a pretended GPU end well, a resumed one too, and the pretended GPU refuses what a real one would."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.pretended import conftest
from tests.pretended.cases import BY_TWO, cases_on
from tests.pretended.ends import ends_well

ROOT = Path(__file__).parents[2]


def run(folder: Path, *names: str, on: str = "pretended") -> list[dict[str, str]]:
    """What each case found, in processes of their own: a pretended GPU changes the engine, a real one may be lost."""
    found: list[dict[str, str]] = []
    while left := names[len(found) :]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "tests.pretended", on, folder / f"from-{len(found)}", *left]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        how = f"**its process ended with exit code {done.returncode}: {done.stderr[-1000:]}**"
        found += told or [{"case": left[0], "found": how}]
    return found


def require_well(found: dict[str, str]) -> None:
    assert ends_well(found["found"]), found


# Of the quick tier, for the slow one has them all.
CROSS_SECTION = (
    "refusals",
    "token budget",
    "a GPU that fails while it verifies",
    "no memory in a backward pass",
    "a GPU that fails in a backward pass",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each case of the cross-section found, one after the other in one process."""
    return {one["case"]: one["found"] for one in run(tmp_path_factory.mktemp("cases"), *CROSS_SECTION)}


def test_what_a_gpu_refuses_the_pretended_one_refuses_too(found: dict[str, str]) -> None:
    assert found["refusals"] == "all refused"


def test_a_run_goes_on_where_tensors_obey_cudas_rules(found: dict[str, str]) -> None:
    assert found["token budget"].endswith("the same bits; ends checked")
    assert "**" not in found["token budget"]


def test_a_gpu_that_fails_while_a_download_is_checked_is_no_verdict_on_it(found: dict[str, str]) -> None:
    assert found["a GPU that fails while it verifies"] == "told as device_failed"


def test_memory_that_runs_out_in_a_backward_pass_is_backed_off(found: dict[str, str]) -> None:
    """In the try of packed rows, in evidence, and before the first step."""
    assert found["no memory in a backward pass"] == "; ".join(3 * ["ends checked"])


def test_a_gpu_that_fails_in_a_backward_pass_is_told(found: dict[str, str]) -> None:
    assert found["a GPU that fails in a backward pass"] == "; ".join(3 * ["told as device_failed"])


@pytest.mark.slow
def test_whichever_operation_fails_a_run_ends_checked_or_says_what_the_machine_did(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.pretended.trouble", tmp_path / "sweep", "1"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.slow
def test_every_kind_of_run_ends_well_where_tensors_obey_cudas_rules(tmp_path: Path) -> None:
    for found in run(tmp_path, *cases_on("pretended")):
        require_well(found)


# --- the same on a real GPU: `pytest -m gpu` ------------------------------------------------------


@pytest.fixture(scope="module")
def found_on_a_gpu(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    """What all chosen cases found, one after the other."""
    items = [item for item in request.session.items if item.get_closest_marker("gpu") and hasattr(item, "callspec")]
    names = [item.callspec.params["name"] for item in items if "found_on_a_gpu" in item.fixturenames]  # type: ignore[attr-defined]
    names = names if gpus() > 1 else [name for name in names if name not in BY_TWO]
    return {found["case"]: found for found in run(tmp_path_factory.mktemp("gpu"), *names, on="cuda")}


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


@pytest.mark.gpu
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", cases_on("cuda"))
def test_every_kind_of_run_ends_well_on_a_gpu(name: str, found_on_a_gpu: dict[str, dict[str, str]]) -> None:
    if name in BY_TWO and gpus() < 2:
        pytest.skip("this machine has one GPU, and the case is for two")
    require_well(found_on_a_gpu[name])


def test_without_a_gpu_the_tests_for_one_are_refused_and_not_skipped(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That pytest asks this before it runs a test, a whole pytest shows in the slow tier."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    marked = SimpleNamespace(get_closest_marker=lambda name: name == "gpu")
    session = SimpleNamespace(config=request.config, items=[marked])
    with pytest.raises(pytest.UsageError, match="pytest -m gpu needs a GPU that this torch can use"):
        conftest.pytest_collection_finish(session)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_pytest_that_is_asked_for_a_gpu_where_there_is_none_is_refused(tmp_path: Path) -> None:
    done = pytest_in_a_process("-m", "gpu", basetemp=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "pytest -m gpu needs a GPU that this torch can use" in done.stderr


def pytest_in_a_process(*asked: str, basetemp: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={basetemp / 'its'}"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    here = "tests/pretended/test_pretended.py"
    return subprocess.run([*command, *asked, here], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_what_two_devices_are_asked_works_with_two_processes(tmp_path: Path) -> None:
    """On the processor: nothing but the device is left for the day on which there are two GPUs."""
    for found in run(tmp_path, *BY_TWO, on="cpu"):
        require_well(found)
