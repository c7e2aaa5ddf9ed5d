"""What a process is set to before a run: in processes of their own, since the settings are a process's."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from lorainit.runtime import matmul, process_tuning, settings
from lorainit.runtime.matmul import OneDnnMeasurement, choose_fp32_library, use_threads
from lorainit.runtime.process_tuning import cpu_quota, usable_cpus
from lorainit.runtime.settings import Setting
from tests.lorainit.forked import Forked

GIVEN = ("OMP_", "MALLOC_", "PYTORCH_")
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(GIVEN)}


def doctor(*options, **environment):
    command = [sys.executable, "-m", "lorainit", "doctor", *options]
    return subprocess.run(command, env={**CLEAN, **environment}, capture_output=True, text=True, timeout=600)


def values(done):
    assert done.returncode == 0, done.stderr
    return {choice["name"]: choice["value"] for choice in json.loads(done.stdout)["choices"]}


@pytest.fixture
def precision():
    """fp32 products as they were, afterwards."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def record(monkeypatch):
    """An empty record, and the process's own afterwards."""
    monkeypatch.setattr(settings, "_record", {})


# --- fp32 products -----------------------------------------------------------------------------


def test_a_faster_library_that_rounds_is_not_taken(precision):
    choice = choose_fp32_library(lambda: OneDnnMeasurement(error=2e-3, ratio=4.0), vendor="AuthenticAMD")
    assert choice.value == "default"
    assert "2.0e-03" in choice.why
    assert torch.get_float32_matmul_precision() == "highest"


def test_an_error_that_is_no_number_is_not_taken_for_a_small_one(precision):
    assert (
        choose_fp32_library(lambda: OneDnnMeasurement(error=math.nan, ratio=4.0), vendor="AuthenticAMD").value
        == "default"
    )


@pytest.mark.parametrize("vendor", ["GenuineIntel", None])
def test_where_the_default_may_be_the_best_it_stays(precision, vendor):
    assert choose_fp32_library(lambda: OneDnnMeasurement(error=0.0, ratio=9.0), vendor=vendor).value == "default"
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("ratio", [2.2, 0.7])
def test_an_exact_library_is_taken_whatever_the_clock_says_just_now(precision, ratio):
    choice = choose_fp32_library(lambda: OneDnnMeasurement(error=4e-7, ratio=ratio), vendor="AuthenticAMD")
    assert (choice.value, choice.measured) == ("oneDNN", {"error": 4e-7, "ratio": ratio})
    assert torch.get_float32_matmul_precision() == "medium"


def test_the_vendor_is_read_where_linux_says_it(tmp_path):
    (tmp_path / "proc").mkdir()
    assert process_tuning.processor_vendor(tmp_path) is None
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert process_tuning.processor_vendor(tmp_path) is None  # ARM
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nprocessor\t: 1\n")
    assert process_tuning.processor_vendor(tmp_path) == "AuthenticAMD"


def test_measuring_leaves_the_default_on_and_finds_float32_exact(precision):
    found = matmul.measure_onednn()
    assert torch.get_float32_matmul_precision() == "highest"
    assert found.error > 1e-8
    assert found.ratio > 0


def test_rounding_to_bf16_is_far_above_the_threshold(precision, monkeypatch):
    linear = matmul.F.linear
    monkeypatch.setattr(matmul.F, "linear", lambda x, W: linear(x.bfloat16().float(), W.bfloat16().float()))
    assert matmul.measure_onednn().error > 1000 * matmul.EXACT


ROUNDING = """
import sys, warnings
warnings.simplefilter("default")
from lorainit import __main__
from lorainit.runtime import matmul, process_tuning
process_tuning.processor_vendor = lambda: "AuthenticAMD"
matmul.measure_onednn = lambda: matmul.OneDnnMeasurement(error=1e-3, ratio=9.0)
code = __main__.main(sys.argv[1:])
print(code, matmul.torch.get_float32_matmul_precision())
"""


def test_a_child_whose_check_fails_trains_in_true_fp32_and_says_so(spec, tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(spec(training={"max_steps": 1}).model_dump_json())
    child = Forked([path, tmp_path / "out"], code=ROUNDING, env={**CLEAN, "OMP_NUM_THREADS": "1"})
    told, errors = child.communicate(timeout=600)
    assert told.split() == ["0", "highest"], errors
    manifest = json.loads((tmp_path / "out" / "adapter" / "manifest.json").read_text())
    assert manifest["hardware"]["settings"]["fp32 products"] == "default"


# --- threads and quotas ------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_no_more_threads_than_cores_are_ours(threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    assert use_threads(1).value == "1"
    assert torch.get_num_threads() == 1


def test_a_number_of_threads_in_the_environment_wins(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    assert use_threads(1).value == "2"
    assert torch.get_num_threads() == 2


def group(root, line, **files):
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(line + "\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_the_tightest_quota_on_the_way_up_counts(tmp_path):
    group(tmp_path, "0::/a/b", a__b__cpu_dot_max="max 100000", a__cpu_dot_max="150000 100000")
    assert cpu_quota(tmp_path) == 1.5
    assert usable_cpus(tmp_path) == 1


def test_in_a_container_the_mount_itself_has_the_quota(tmp_path):
    group(tmp_path, "0::/not/visible/here", cpu_dot_max="50000 100000")
    assert cpu_quota(tmp_path) == 0.5
    assert usable_cpus(tmp_path) == 1


def test_the_older_cgroups_are_read_too(tmp_path):
    files = {"cpu,cpuacct__job__cpu_dot_cfs_quota_us": "300000", "cpu,cpuacct__job__cpu_dot_cfs_period_us": "100000"}
    group(tmp_path, "4:cpu,cpuacct:/job", **files)
    assert cpu_quota(tmp_path) == 3.0


def test_no_quota_is_no_limit(tmp_path):
    assert cpu_quota(tmp_path) == math.inf  # no /proc
    group(tmp_path, "0::/", cpu_dot_max="max 100000")
    assert cpu_quota(tmp_path) == math.inf
    files = {"cpu__cpu_dot_cfs_quota_us": "-1", "cpu__cpu_dot_cfs_period_us": "100000"}
    group(tmp_path, "1:cpu:/", **files)
    assert cpu_quota(tmp_path) == math.inf
    assert usable_cpus(tmp_path) == len(os.sched_getaffinity(0))


# --- memory ------------------------------------------------------------------------------------

FAULTS = """
import ctypes, resource
from lorainit.runtime import process_tuning
print(process_tuning.keep_freed_memory().value)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def use_and_free():
    block = libc.malloc(64 << 20)
    libc.memset(block, 1, 64 << 20)
    libc.free(block)
use_and_free()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use_and_free()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment):
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env={**CLEAN, **environment}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    value, count = done.stdout.strip().splitlines()
    return value, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_not_fetched_from_the_system_again():
    value, count = faults()
    assert value == "keeps freed memory"
    assert count < 100
    given, before = faults(MALLOC_TOP_PAD_="131072")
    assert given == "as given"
    assert before > 1000


# --- the whole -----------------------------------------------------------------------------------


def test_doctor_says_what_a_run_would_find_in_words():
    done = doctor(OMP_DISPLAY_ENV="VERBOSE")
    assert done.returncode == 0, done.stderr
    assert "fp32 products" in done.stdout
    assert f"torch {torch.__version__}" in done.stdout
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr  # what the library really read


def test_doctor_speaks_json_and_the_environment_wins():
    found = values(doctor("--json", OMP_NUM_THREADS="1", GOMP_SPINCOUNT="7", MALLOC_TOP_PAD_="131072"))
    assert found["threads"] == "1"
    assert found["waiting threads"] == "7"
    assert found["allocator"] == "as given"
    assert found["fp32 products"] in ("default", "oneDNN")


@pytest.mark.slow
def test_the_same_machine_chooses_the_same_again():
    assert values(doctor("--json")) == values(doctor("--json"))


def test_others_add_to_the_record_and_the_event_tells_all(record):
    settings.record(Setting("attention", "grouped", "fastest here", {"ratio": 1.3}))
    assert settings.values() == {"attention": "grouped"}
    event = process_tuning.settings_event()
    assert event.message == "Process settings: attention = grouped"
    assert event.data == {
        "kind": "machine",
        "choices": [{"name": "attention", "value": "grouped", "why": "fastest here", "ratio": 1.3}],
    }


def runtime_cache_dir():
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def test_a_process_that_calls_run_itself_keeps_its_settings(record):
    assert settings.list_recorded() == ()
    assert settings.values() == {}


def test_kernels_are_kept_in_the_cache_unless_the_environment_says_where(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    process_tuning.keep_compiled_kernels(None)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    process_tuning.keep_compiled_kernels(str(tmp_path))
    assert runtime_cache_dir() == str(tmp_path / "kernels")
    process_tuning.keep_compiled_kernels("elsewhere")
    assert runtime_cache_dir() == str(tmp_path / "kernels")
