"""What the doctor says of a GPU: its trouble first."""

import pytest

from lorainit import __main__
from lorainit.runtime import devices, doctor
from lorainit.system.doctor_text import as_text

TROUBLE = "GPU 0 of those that are visible does not compute: CUDA error: uncorrectable ECC error encountered"


def found(trouble):
    facts = {"platform": "Linux", "usable_cpus": 2, "cpus": 2, "memory_bytes": 2**30, "gpu": "NVIDIA H100"}
    facts |= {"gpus": ["0"], "driver": "580.65", "cuda": "13.0", "gpu_trouble": trouble}
    return {"machine": facts, "packages": {}, "choices": []}


def test_a_gpu_that_does_not_compute_is_not_shown_as_fine():
    assert f"GPU: NVIDIA H100: no run is started: {TROUBLE}\n" in as_text(found(TROUBLE))


def test_a_gpu_that_computes_is_shown_with_its_driver():
    assert "GPU: NVIDIA H100 (visible: 0), driver 580.65, CUDA 13.0" in as_text(found(None))


@pytest.mark.parametrize(("arguments", "trouble", "code"), [([], TROUBLE, 1), (["--json"], TROUBLE, 0), ([], None, 0)])
def test_trouble_fails_the_command_for_people_and_programs_read_it(monkeypatch, arguments, trouble, code):
    monkeypatch.setattr(doctor, "examine", lambda: found(trouble))
    assert __main__.main(["doctor", *arguments]) == code


def test_a_gpu_that_cuda_counts_and_cannot_start_is_told_by_the_look_that_follows(monkeypatch):
    def busy(*_args, **_named):
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(devices.torch.cuda, "get_device_name", busy)
    monkeypatch.setattr(devices.torch, "ones", busy)
    assert devices.describe_machine()["gpu"] is None
    assert "busy or unavailable" in devices.find_failing_gpu()
