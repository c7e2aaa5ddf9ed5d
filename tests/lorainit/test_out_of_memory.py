"""How libraries say that memory is used up."""

import errno
from functools import partial

import pytest
from torch.distributed import DistBackendError

from lorainit.runtime.devices import is_out_of_memory


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (RuntimeError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
        (RuntimeError, "CUDA error: out of memory"),
        (RuntimeError, "CUDA driver error: out of memory"),
        (RuntimeError, "Triton Error [CUDA]: out of memory"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        (RuntimeError, "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        (RuntimeError, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        (DistBackendError, "NCCL error ... ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
         "Cuda failure 2 'out of memory'"),
        (DistBackendError, "NCCL error ... Last error:\nFailed to CUDA calloc 10485760 bytes"),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        (DistBackendError, "NCCL error ... Last error:\nFailed to CUDA malloc 10485760 bytes"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtCreate(&handle)`"),
        (RuntimeError, "cusolver error: CUSOLVER_STATUS_NOT_INITIALIZED, when calling `cusolverDnCreate(handle)`"),
        (RuntimeError, "unable to mmap 5000 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
        (partial(OSError, errno.ENOMEM), "Cannot allocate memory"),
        (MemoryError, ""),
    ],
)  # fmt: skip
def test_memory_that_ran_out_is_known_in_every_librarys_words(kind, text):
    assert is_out_of_memory(kind(text))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle)`"),
        RuntimeError("out of resource: shared memory, Required: 264192, Hardware limit: 232448"),
        ValueError("the text of a row says: out of memory"),
    ],
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)
