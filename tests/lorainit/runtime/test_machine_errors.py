"""Whose fault an error of a GPU is, by what its libraries say: the machine's, or the run's own."""

import errno

import pytest
import torch
from safetensors import SafetensorError

from lorainit import __main__ as main
from lorainit.config.errors import DiskFull, HostFailed, OutOfMemory, TooFewDevices, UnusableDevice
from lorainit.config.events import Failed, Message
from lorainit.runtime import devices, machine_errors
from lorainit.runtime.distributed import run_errors, world
from lorainit.runtime.distributed.launch import PeerProcesses
from lorainit.system import gpus
from worker.job import outcomes

ADVICE = "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below"
ASSERT = RuntimeError("CUDA error: device-side assert triggered" + ADVICE)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env variable"
        " CUDA_VISIBLE_DEVICES after program start. Setting the available devices to be zero.",
        "CUDA error: unknown error",
        "No CUDA GPUs are available",
        "The NVIDIA driver on your system is too old (found version 11040).",
        "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: no kernel image is available for execution on the device",
        "CUDA error: all CUDA-capable devices are busy or unavailable",
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb, m, n, k)`",
        "Triton Error [CUDA]: misaligned address",
        "Triton Error [CUDA]: device kernel image is invalid",
        "CUDA error: the provided PTX was compiled with an unsupported toolchain.",
        "CUDA error: API call is not supported in the installed CUDA driver",
        "CUDA error: OS call failed or operation not supported on this OS",
        "CUDA error: MPS client has been terminated by the server",
        "CUDA error: driver shutting down",
        "CUDA error: words that nobody has heard yet",
        'device >= 0 && device < num_gpus INTERNAL ASSERT FAILED at "CUDAContext.cpp":49. device=1, num_gpus=',
        "NVML_SUCCESS == DriverAPI::get()->nvmlInit_v2_() INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp:1124",
        "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error. Last error: Cuda failure 999 'unknown error'",
    ],
)
def test_a_gpu_that_fails_is_the_machines_fault(words):
    found = run_errors.translate_error(RuntimeError(words + ADVICE))
    assert isinstance(found, UnusableDevice)
    assert found.code == "device_failed"
    assert words[:80] in found.message
    assert "asynchronously" not in found.message


@pytest.mark.parametrize(
    "words",
    [
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
        "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnXsyevd`. This error may appear if"
        " the input matrix contains NaN. You may use torch.backends.cuda.preferred_linalg_library()",
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
        "an unknown error in a tokenizer",
        "CUDA error: device-side assert triggered",
        "CUDA error: invalid configuration argument",
        "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul( ltHandle, computeDesc.descriptor())`",
        "CUDA error: too many resources requested for launch",
        "CUDA error: operation not permitted when stream is capturing",
        "Triton Error [CUDA]: invalid argument",
    ],
)
def test_what_the_run_does_wrong_is_not(words):
    assert not machine_errors.is_failed_device(RuntimeError(words))
    assert run_errors.translate_error(RuntimeError(words)) is None


SHARED_MEMORY = [
    "unable to allocate shared memory(shm) for file </torch_19921_3177843093_0>: No space left on device (28)",
    "NCCL error in: NCCLUtils.cpp:94, unhandled system error, NCCL version 2.27.3 Last error: Error while creating"
    " shared memory segment /dev/shm/nccl-JEBY9C (size 5767520)",
    "DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that dataloader's workers are out of"
    " shared memory. Please try to raise your shared memory limit.",
]


@pytest.mark.parametrize("error", [*map(RuntimeError, SHARED_MEMORY), OSError(28, "No space left on device", "/psm_1")])
def test_a_full_dev_shm_is_no_full_disk(error):
    found = run_errors.translate_error(error)
    assert found.code == "worker_lost"
    assert "/dev/shm" in found.message
    assert "shm_size" in found.message


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "/scratch/a"),
        RuntimeError("[enforce fail] No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_whichever_library_writes(error):
    assert isinstance(run_errors.translate_error(error), DiskFull)


def test_a_kernel_that_wants_more_of_a_gpus_own_shared_memory_is_neither():
    error = RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376")
    assert run_errors.translate_error(error) is None


def test_what_a_library_wraps_is_known_by_its_cause():
    wrapped = ValueError("The weights cannot be loaded.")
    wrapped.__cause__ = RuntimeError("CUDA error: unknown error")
    assert machine_errors.is_machine_failure(wrapped)
    assert isinstance(run_errors.translate_error(wrapped), UnusableDevice)


def test_memory_that_ran_out_is_no_broken_gpu():
    error = RuntimeError("NCCL error: unhandled cuda error. Cuda failure 2 'out of memory', then 'unknown error'")
    assert isinstance(run_errors.translate_error(error), OutOfMemory)


def test_a_gpu_that_fails_in_one_runs_own_work_ends_all_that_share_it():
    with pytest.raises(UnusableDevice, match="unknown error"):
        run_errors.to_run_error(RuntimeError("CUDA error: unknown error"), alone=False)
    with pytest.raises(RuntimeError, match="device-side assert"):
        run_errors.to_run_error(ASSERT, alone=False)


@pytest.mark.parametrize(("count", "told"), [(1, ["internal_error"]), (2, [])])
def test_a_kernel_that_refuses_its_numbers_is_a_verdict_on_one_run_only(monkeypatch, spec, tmp_path, count, told):
    """Of several nobody knows whose it was: without a word the worker tries each by itself."""

    def broken(_requests):
        raise ASSERT
        yield

    monkeypatch.setattr("lorainit.run.run_together", broken)
    monkeypatch.setattr(main.process_tuning, "tune_process", lambda: Message(message="m"))
    heard = []
    runs = [(spec(), main._RunArguments(tmp_path, tmp_path, None)) for _ in range(count)]
    assert main._run(runs, main.StopRequest([]), heard.append, PeerProcesses()) == 1
    assert [event.code for event in heard if isinstance(event, Failed)] == told


def told_before_it_begins(monkeypatch, spec, folder, error):
    """What a run says that meets this error before `run_together`."""

    def broken(_cache):
        raise error

    heard = []
    monkeypatch.setattr(main.process_tuning, "tune_process", lambda: Message(message="m"))
    monkeypatch.setattr(main.process_tuning, "keep_compiled_kernels", broken)
    assert (
        main._run(
            [(spec(), main._RunArguments(folder, folder, None))], main.StopRequest([]), heard.append, PeerProcesses()
        )
        == 1
    )
    return [event.code for event in heard if isinstance(event, Failed)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device", "/cache"), "disk_full"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("CUDA error: unknown error"), "device_failed"),
        (RuntimeError("a bug"), "internal_error"),
    ],
)
def test_what_goes_wrong_before_a_run_begins_is_told_in_our_words_too(monkeypatch, spec, tmp_path, error, code):
    assert told_before_it_begins(monkeypatch, spec, tmp_path, error) == [code]


def test_a_run_whose_other_processes_cannot_be_started_says_why(monkeypatch, spec, tmp_path):
    def broken(*_args, **_named):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(main, "start_peers", broken)
    runs, heard = [(spec(devices=2), main._RunArguments(tmp_path, tmp_path, None))], []
    assert main._run_with_peers(runs, main.StopRequest([]), heard.append) == 1
    assert [event.code for event in heard] == ["out_of_memory"]


def test_a_worker_with_fewer_devices_than_the_api_promised_has_the_job_tried_elsewhere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(TooFewDevices, match="2 devices, and its worker sees 1") as refused:
        world._select_gpu(1, 2)
    assert refused.value.code in outcomes.RETRIED_CODES


@pytest.fixture
def a_gpu(monkeypatch):
    """One that torch shows; tensors that are meant for it go where the test says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    ones = torch.ones

    def on(make):
        monkeypatch.setattr(torch, "ones", lambda *size, device=None: make(ones(*size)))

    return on


def broken(_tensor):
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered")


def full(_tensor):
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda t: t, None),
        (full, None),
        (lambda t: t + 1, "GPU 0 of those that are visible does not compute: a product is wrong"),
        (broken, "GPU 0 of those that are visible does not compute: CUDA error: uncorrectable ECC error encountered"),
    ],
)
def test_the_doctor_lets_each_gpu_compute(a_gpu, make, expected):
    a_gpu(make)
    assert devices.find_failing_gpu() == expected


def test_a_gpu_that_torch_alone_cannot_find_is_the_machines_fault_before_the_run_begins(monkeypatch):
    """An identity in CUDA_VISIBLE_DEVICES that no GPU here has: the driver's files do not tell."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpus, "find_problem", lambda: None)
    monkeypatch.setattr(gpus, "list_visible", lambda: ["GPU-5d1e7a10-0000-1111-2222-333344445555"])
    with pytest.raises(UnusableDevice) as refused:
        devices.pick_device()
    assert refused.value.code == "device_failed"


# --- the host: its disks, its room for open files and processes -----------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error", "/models/config.json"),
        OSError(errno.EMFILE, "Too many open files", "/models/config.json"),
        OSError(errno.ESTALE, "Stale file handle", "/models/config.json"),
        OSError(errno.EROFS, "Read-only file system", "/scratch/a"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)"),
        RuntimeError("can't start new thread"),
    ],
)
def test_a_host_that_fails_is_the_machines_fault(error):
    assert machine_errors.is_machine_failure(error)
    found = run_errors.translate_error(error)
    assert isinstance(found, HostFailed)
    assert found.code in outcomes.RETRIED_CODES
    assert str(error) in found.message


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/models/config.json"),
        PermissionError(errno.EACCES, "Permission denied", "/models/config.json"),
        FileNotFoundError("No such file or directory: /models/model.safetensors"),
        SafetensorError("Error while deserializing header: incomplete metadata, file not fully covered"),
    ],
)
def test_a_file_that_is_not_there_or_is_broken_is_no_failure_of_the_host(error):
    assert not machine_errors.is_machine_failure(error)


def test_a_file_that_safetensors_cannot_open_though_it_is_there_is_a_failure_of_the_host(tmp_path):
    """The library says of each file that it cannot open that there is none."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    error = FileNotFoundError(f"No such file or directory: {file}")
    assert isinstance(run_errors.translate_error(error), HostFailed)


@pytest.mark.parametrize(
    "words",
    [
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "CUDA error: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES when calling `cusparseCreate(handle)`",
        "std::bad_alloc",
    ],
)
def test_a_library_without_room_for_itself_has_run_out_of_memory(words):
    assert isinstance(run_errors.translate_error(RuntimeError(words)), OutOfMemory)


def test_an_error_that_bears_cudas_number_is_cudas():
    assert isinstance(run_errors.translate_error(RuntimeError("Error 802: system not yet initialized")), UnusableDevice)
