"""The errors that the library raises on purpose, as one tree.

Every error has a `code` from the closed list of job errors, a message that is a complete sentence, and the field that
it is about. "Transient" marks errors after which the same run may succeed later, so it is tried again. "Operator" marks
errors that only the operator of the machine can remove.

    LorainitError
    ├── InvalidTrainingFile, InvalidValidationFile, NoTrainableTokens, SequenceTooLong
    ├── HubUnavailable         (transient)
    ├── UnsupportedModel, UnsupportedInit, RankTooLarge, UnknownTarget
    ├── InitFailed, NonFiniteLoss, OutOfMemory, DiskFull
    ├── UpdateOutOfMemory      (transient: the same update did fit before step 1)
    ├── ExportCheckFailed, CheckpointMismatch, GroupMismatch
    ├── TooFewDevices          (operator: the worker has fewer devices than its settings say)
    ├── SharedMemoryFull       (operator: /dev/shm, through which processes share memory, is full)
    ├── HostFailed             (operator: a disk fails, or the host allows no more open files or processes)
    ├── DeviceSilent           (transient: a process of the run has ended or does not answer the others)
    ├── UnusableDevice         (operator: the machine has GPUs, but CUDA cannot use them)
    ├── HaltReached            (no failure: the run has reached the step at which it was to wait for a decision)
    ├── Dropped                (no failure: one run of a group now belongs to another worker or to nobody)
    └── Stopped                (no failure: somebody asked the run to stop)
"""

from typing import ClassVar


class LorainitError(Exception):
    """Base class of all errors that this library raises on purpose.

    Args:
        message: one complete sentence.
        param: dotted path of the field that it is about, as the caller wrote it.

    `may_pass`: the same run may succeed later. This is a property of the class, because errors with the same `code` can
    differ in it.
    """

    code: ClassVar[str] = "internal_error"
    may_pass: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidTrainingFile(LorainitError):
    """The training file has rows that cannot be used."""

    code = "invalid_training_file"


class InvalidValidationFile(LorainitError):
    """The validation file has rows that cannot be used."""

    code = "invalid_validation_file"


class NoTrainableTokens(LorainitError):
    """Every token is masked. The run is refused because it would learn nothing and still be reported as a success."""

    code = "no_trainable_tokens"


class SequenceTooLong(LorainitError):
    """`max_length` is above what the base model's config.json allows."""

    code = "sequence_too_long"


class UnsupportedModel(LorainitError):
    """The base model cannot be loaded or is not a causal language model we can train."""

    code = "unsupported_model"


class HubUnavailable(LorainitError):
    """The model hub does not answer or reports a fault of its own, so a later attempt may succeed."""

    code = "hub_unavailable"


class UnsupportedInit(LorainitError):
    """The initialization cannot work on this module or this base; the message names the module."""

    code = "unsupported_init_for_model"


class RankTooLarge(LorainitError):
    """The rank exceeds the smaller side of a target matrix."""

    code = "rank_too_large"


class UnknownTarget(LorainitError):
    """A target module matches nothing that can carry a LoRA."""

    code = "invalid_value"


class InitFailed(LorainitError):
    """The initialization ran, but its result is not what the method guarantees."""

    code = "init_failed"


class NonFiniteLoss(LorainitError):
    """The loss or the gradient norm became NaN or infinite."""

    code = "non_finite_loss"


class OutOfMemory(LorainitError):
    """The device or the host ran out of memory."""

    code = "out_of_memory"


class UpdateOutOfMemory(OutOfMemory):
    """The optimizer's update of a step ran out of memory, though it fitted before the first step."""

    may_pass = True

    def __init__(self, step: int) -> None:
        super().__init__(
            f"The optimizer's update of step {step} ran out of memory, although it fitted before step 1. A lower"
            " lora.r, fewer target modules, or adamw instead of another optimizer would help; smaller batches would"
            " not.",
            param="lora.r",
        )


class DiskFull(LorainitError):
    """A file could not be written because the disk is full."""

    code = "disk_full"


class ExportCheckFailed(LorainitError):
    """The exported adapter, reloaded on the untouched base, does not compute what the trained model computes."""

    code = "export_check_failed"


class CheckpointMismatch(LorainitError):
    """The run to resume has other settings than the run that wrote the checkpoint."""

    code = "internal_error"


class GroupMismatch(LorainitError):
    """Runs that should be trained together cannot share a forward pass."""

    code = "unsupported_combination"


class TooFewDevices(LorainitError):
    """The machine has fewer devices than the run needs. Another worker may have enough, so the run is tried there."""

    code = "device_failed"


class SharedMemoryFull(LorainitError):
    """The shared memory in /dev/shm is full, which processes exchange tensors through. Another worker may have more."""

    code = "worker_lost"


class HostFailed(LorainitError):
    """A disk of the host failed, or its limit of open files or processes was reached. Another worker may succeed."""

    code = "worker_lost"


class DeviceSilent(LorainitError):
    """One of the run's processes has ended or hangs, or the connection to it is broken."""

    code = "worker_lost"


class UnusableDevice(LorainitError):
    """CUDA cannot use the machine's GPUs, or one failed during the run.

    The run does not continue on the CPU, because there it would take days without anybody noticing the cause.
    """

    code = "device_failed"


class HaltReached(LorainitError):
    """The run has reached `RunSpec.stop_after` and has written a checkpoint, from which it can be resumed."""


class Dropped(LorainitError):
    """Raised by `on_event` for one run of a group that nobody waits for any more. The other runs of the group go on."""

    code = "stopped"


class Stopped(LorainitError):
    """Raised by the caller's `on_event` to stop the run; not a failure."""

    code = "stopped"
