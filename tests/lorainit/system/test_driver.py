"""What the NVIDIA driver lists is read, its silence is noticed, and names that it does not know are told."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lorainit.__main__ import main
from lorainit.system import driver, gpus
from lorainit.system.driver import Gpu

TWO = """GPU 0: NVIDIA H200 (UUID: GPU-8932f937-d72c-4106-c12f-20bd9faed9f6)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 1g.5gb      Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 1g.5gb      Device  1: (UUID: MIG-c6d4aaaa-65d9-5b0a-a6c9-0a0c0b0d0e0f)
"""
H200, A100 = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77"
FIRST, SECOND = "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f", "MIG-c6d4aaaa-65d9-5b0a-a6c9-0a0c0b0d0e0f"
GPUS = [Gpu(H200, ()), Gpu(A100, (FIRST, SECOND))]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a script of that name in the path."""

    def make(script: str) -> None:
        (tmp_path / driver.PROGRAM).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / driver.PROGRAM).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return make


def test_gpus_are_listed_with_their_instances(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi(f'[ "$1" = -L ] && cat <<END\n{TWO}END')
    assert driver.list_gpus() == GPUS


def test_a_driver_that_hangs_is_told(nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "ANSWER_SECONDS", 1.0)
    nvidia_smi("sleep 600")
    with pytest.raises(driver.DriverSilent, match=r"hangs: nvidia-smi has not answered within 1 seconds\."):
        driver.list_gpus()


def test_an_nvidia_smi_that_fails_lists_nothing(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi("echo 'Failed to initialize NVML'; exit 9")
    assert driver.list_gpus() is None


def test_without_nvidia_smi_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver.list_gpus() is None


@pytest.mark.parametrize("names", [["0", "7"], [H200], ["GPU-8932"], ["gpu-5D5B"], [FIRST, SECOND], ["MIG-c6d4f"], []])
def test_names_of_what_is_there_are_no_trouble(names: list[str]) -> None:
    assert driver.find_name_problem(names, GPUS) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("GPU-dead", rf"names GPU-dead, and the driver lists {H200}, {A100}, {FIRST}, {SECOND}"),
        ("MIG-c6d4", rf"names MIG-c6d4, with which 2 identities begin: {FIRST}, {SECOND}"),
    ],
)
def test_a_name_of_no_gpu_or_of_several_is_told(name: str, words: str) -> None:
    assert driver.find_name_problem([H200, name], GPUS) == words


def test_the_doctor_of_a_run_ends_with_the_reason_when_the_driver_hangs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hang() -> None:
        raise driver.DriverSilent("It hangs.")

    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.setattr(driver, "list_gpus", hang)
    assert main(["doctor"]) == 1
    assert capsys.readouterr() == ("", "It hangs.\n")
