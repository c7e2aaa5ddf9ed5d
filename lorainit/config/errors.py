"""What the library may refuse, as one small tree.

Every error carries a `code` from the closed list of job errors, a complete sentence, and the
field it is about. It knows nothing of HTTP, of jobs or of the database.

    LorainitError
    ├── InvalidTrainingFile, InvalidValidationFile, NoTrainableTokens, SequenceTooLong
    ├── HubUnavailable         (passes: the same run may succeed later)
    ├── UnsupportedModel, UnsupportedInit, RankTooLarge, UnknownTarget
    ├── InitFailed, NonFiniteLoss, OutOfMemory, DiskFull
    ├── UpdateOutOfMemory      (passes: an update that fitted before step 1)
    ├── ExportCheckFailed, CheckpointMismatch, GroupMismatch
    ├── TooFewDevices          (the operator's: more devices were promised than the worker has)
    ├── SharedMemoryFull       (the operator's: /dev/shm, in which processes hand each other memory)
    ├── HostFailed             (the operator's: a disk that cannot be read, no room for another open file)
    ├── DeviceSilent           (passes: a process of the run is gone, or does not answer the others)
    ├── UnusableDevice         (the operator's: there are GPUs, and CUDA cannot use them, or not any more)
    ├── Dropped                (not a failure: one run of a group is not ours any more)
    └── Stopped                (not a failure: somebody asked the run to stop)
"""

from typing import ClassVar


class LorainitError(Exception):
    """Base of everything this library raises on purpose.

    Args:
        message: one sentence that is complete on its own.
        param: dotted path of the field it is about, as the caller spelled it.

    `may_pass`: the same run may succeed later, whatever the code says of others that have it.
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
    """Every token is masked: the run would learn nothing and call it success."""

    code = "no_trainable_tokens"


class SequenceTooLong(LorainitError):
    """`max_length` is above what the base model's config.json allows."""

    code = "sequence_too_long"


class UnsupportedModel(LorainitError):
    """The base model cannot be loaded or is not a causal language model we can train."""

    code = "unsupported_model"


class HubUnavailable(LorainitError):
    """The model hub does not answer, or says that it cannot now: another try may have the base model."""

    code = "hub_unavailable"


class UnsupportedInit(LorainitError):
    """The method cannot work on this module or this base; the message names the module."""

    code = "unsupported_init_for_model"


class RankTooLarge(LorainitError):
    """The rank exceeds the smaller side of a target matrix."""

    code = "rank_too_large"


class UnknownTarget(LorainitError):
    """A target module matches nothing that can carry a LoRA."""

    code = "invalid_value"


class InitFailed(LorainitError):
    """The initialization ran and did not deliver what it promised."""

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
            "A lower lora.r, fewer target modules, or the optimizer adamw where it is another one would help, smaller"
            f" batches would not: the optimizer's update of step {step} ran out of memory, which fitted before step 1.",
            param="lora.r",
        )


class DiskFull(LorainitError):
    """A file could not be written for lack of space."""

    code = "disk_full"


class ExportCheckFailed(LorainitError):
    """The exported adapter, reloaded on the untouched base, is not the trained model."""

    code = "export_check_failed"


class CheckpointMismatch(LorainitError):
    """A checkpoint was made by another recipe than the one that wants to resume from it."""

    code = "internal_error"


class GroupMismatch(LorainitError):
    """Runs that were to train together cannot share a forward pass."""

    code = "unsupported_combination"


class TooFewDevices(LorainitError):
    """The machine has fewer devices than the run was promised; another worker may have them."""

    code = "device_failed"


class SharedMemoryFull(LorainitError):
    """There is no room in /dev/shm, in which processes hand each other memory; another worker may have more of it."""

    code = "worker_lost"


class HostFailed(LorainitError):
    """The host's disks, or its room for open files and processes, failed the run; another worker may do it."""

    code = "worker_lost"


class DeviceSilent(LorainitError):
    """One of the run's processes, or the connection to it, hangs or is gone."""

    code = "worker_lost"


class UnusableDevice(LorainitError):
    """The machine has GPUs that CUDA cannot use, or one that failed in mid-run; the processor is no substitute."""

    code = "device_failed"


class Dropped(LorainitError):
    """A member's `on_event` says that nobody waits for this run any more; the others of its group go on."""

    code = "stopped"


class Stopped(LorainitError):
    """The caller's `on_event` asked the run to stop. Nothing is wrong."""

    code = "stopped"
