"""GPUs that are meant and cannot be used are said so, without torch; nobody lands on the processor unasked."""

import pytest
import torch

from lorainit.config.errors import UnusableDevice
from lorainit.runtime import devices
from lorainit.system import gpus

DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Wed Sep 10 03:38:13 UTC 2025\nGCC version: gcc 13\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Make a machine: GPUs, driver, torch's CUDA, `CUDA_VISIBLE_DEVICES`."""

    def make(count=2, *, driver="580.95.05", cuda="13.0", asked=None):
        monkeypatch.delenv(gpus.VISIBLE, raising=False)
        if asked is not None:
            monkeypatch.setenv(gpus.VISIBLE, asked)
        (tmp_path / "dev").mkdir()
        for name in [*map(str, range(count)), "ctl", "-uvm"] if count else []:
            (tmp_path / "dev" / f"nvidia{name}").touch()
        if driver:
            (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
            (tmp_path / "proc/driver/nvidia/version").write_text(DRIVER.format(driver))
        monkeypatch.setattr(gpus, "cuda_of_torch", lambda: cuda)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        (None, ["0", "1"]),
        ("", []),
        ("-1", []),
        ("1", ["1"]),
        ("1, 0", ["1", "0"]),
        ("1,-1,0", ["1"]),
        ("GPU-8932f937,MIG-5c6a", ["GPU-8932f937", "MIG-5c6a"]),
    ],
)
def test_what_is_visible_is_read_as_cuda_reads_it(machine, asked, names):
    assert gpus.list_visible(machine(asked=asked)) == names


def test_a_machine_without_gpus_shows_none_whatever_is_asked(machine):
    assert gpus.list_visible(machine(0, driver=None, asked="0")) == []


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"count": 0, "driver": None},
        {"driver": "535.183.01", "cuda": "12.8"},  # CUDA 12 with any driver of its time
        {"driver": "470.42", "asked": ""},  # the processor is meant
        {"driver": "470.42", "cuda": None},
        {"driver": None},
        {"driver": "470.42", "cuda": "14.1"},  # not known to be too old
        {"asked": "MIG-5c6a"},
        {"asked": "GPU-8932,GPU-5c6a"},
        {"asked": "MIG-GPU-8932f937/1/0,MIG-GPU-8932f937/1/01"},
    ],
)
def test_there_is_no_trouble(machine, case):
    assert gpus.find_problem(machine(**case)) is None


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"driver": "535.183.01"}, r"driver is 535\.183\.01, .* CUDA 13\.0 needs 580\.0 or newer"),
        ({"asked": "0,2"}, r"names GPU 2, and this machine shows 2 \(they count from 0\)"),
        ({"count": 0, "driver": None, "asked": "0"}, "names GPU 0, and this machine shows none"),
        ({"count": 0, "driver": None, "asked": "GPU-5d1e"}, "names GPU-5d1e, and this machine shows none"),
        ({"count": 0, "driver": None, "asked": "MIG-5c6a"}, "names MIG-5c6a, and this machine shows none"),
        ({"asked": "0,nonsense,1"}, "names 'nonsense', which is neither"),
        ({"asked": "all"}, "names 'all', which is neither"),
        ({"asked": "cuda:0"}, "names 'cuda:0', which is neither"),
        ({"asked": "0,0"}, "names 0 twice"),
        ({"asked": "01,1"}, "names 1 twice"),
        ({"asked": "MIG-5c6a,MIG-5c6a"}, "names MIG-5c6a twice"),
        ({"asked": "GPU-8932,GPU-5c6a,GPU-8932f937-d72c"}, "names GPU-8932f937-d72c twice"),
        ({"asked": "GPU-8932F937,GPU-8932f9"}, "names GPU-8932f9 twice"),
        ({"asked": "0,GPU-8932f937"}, r"more than one way \(0, GPU-8932f937\): CUDA reads the first way only"),
        ({"asked": "GPU-8932f937,MIG-5c6a"}, "more than one way"),
        ({"asked": "0,MIG-5c6a"}, "more than one way"),
        ({"asked": "MIG-GPU-8932f937/1/0,MIG-5c6a"}, "more than one way"),
    ],
)
def test_gpus_that_cannot_be_used_are_told_with_the_reason(machine, case, words):
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(gpus.find_problem(machine(**case)))


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ({}, None),
        ({"count": 0, "driver": None, "asked": "0"}, None),  # which is trouble
        ({"count": 0, "driver": None}, "this machine shows no NVIDIA GPU"),
        ({"asked": ""}, "CUDA_VISIBLE_DEVICES names none"),
        ({"cuda": None}, "the installed torch has no CUDA"),
    ],
)
def test_why_runs_go_to_the_processor_is_known(machine, case, why):
    assert gpus.explain_no_gpu(machine(**case)) == why


def test_what_torch_was_built_for_is_known_without_loading_it():
    assert gpus.cuda_of_torch() == torch.version.cuda


def test_a_run_beside_a_gpu_that_cuda_cannot_use_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpus, "find_problem", lambda: "The NVIDIA driver is old.")
    with pytest.raises(UnusableDevice, match=r"^The NVIDIA driver is old\.$"):
        devices.pick_device()


def test_a_reason_that_only_cuda_knows_is_told_in_its_words(monkeypatch):
    def fail():
        raise RuntimeError("CUDA unknown error")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(gpus, "find_problem", lambda: None)
    monkeypatch.setattr(gpus, "list_visible", lambda: ["0"])
    with pytest.raises(UnusableDevice, match="CUDA cannot use it: CUDA unknown error"):
        devices.pick_device()


def test_a_run_that_needs_a_gpu_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpus, "explain_no_gpu", lambda: "this machine shows no NVIDIA GPU")
    monkeypatch.setattr(gpus, "find_problem", lambda: None)
    monkeypatch.setenv(gpus.NEEDED, "1")
    with pytest.raises(UnusableDevice, match=r"^This run needs a GPU, and this machine shows no NVIDIA GPU\.$"):
        devices.pick_device()


def test_without_a_gpu_a_run_goes_to_the_processor():
    assert devices.pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
