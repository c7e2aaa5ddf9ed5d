"""The events of a run. Nothing else passes from a run to its caller while it works.

`run(spec, out, on_event)` calls `on_event` with these models for each layer, batch and step. The worker's child process
writes them to a pipe as JSON lines, the command line shows a progress bar, and tests collect them in a list. An
exception that `on_event` raises stops the run.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from lorainit.config.model_facts import LeftOut
from lorainit.config.schema import Strict
from lorainit.config.spec import Choice

StageName = Literal["loading", "initializing", "training", "evaluating", "exporting", "verifying", "done"]


class _Event(BaseModel):
    """`member`: which run of a group emits it, from 0; always 0 for a single run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    member: Annotated[int, Field(ge=0)] = 0


class Stage(_Event):
    """The run entered a stage."""

    kind: Literal["stage"] = "stage"
    stage: StageName
    message: str


class Tick(_Event):
    """Progress: `done` of `total` units of the current stage (layers, batches). Not stored.

    It also shows the watchdog that the run does not hang.
    """

    kind: Literal["tick"] = "tick"
    done: int
    total: int


class Message(_Event):
    """A sentence for the job's event list; `data["kind"]` is its subject: `data`, `init`, `export`, ..."""

    kind: Literal["message"] = "message"
    level: Literal["info", "warn", "error"] = "info"
    message: str
    data: dict[str, Any] = {}


class Plan(_Event):
    """What the run will do, once data and model are known: resolved numbers and sizes.

    A forward pass has at most `micro_batch_size` rows and `tokens_per_pass` tokens; if memory changes that, the plan is
    emitted again. `trainable_parameters` counts rank r in every layer. If the method spreads ranks over layers, this is
    an estimate (`trainable_parameters_estimated`), and `init_report` has the number. `choices` are the values for
    "auto" that depend on the machine. `left_out`: kinds of layers that were asked for but get no adapter.
    """

    kind: Literal["plan"] = "plan"
    total_steps: int
    steps_per_epoch: int
    rows: int
    trained_tokens_per_epoch: int
    micro_batch_size: int
    tokens_per_pass: int
    modules: int
    trainable_parameters: int
    trainable_parameters_estimated: bool = False
    target_modules: list[str]
    left_out: list[LeftOut] = []
    device: str
    precision: str
    choices: list[Choice] = []


class Metrics(_Event):
    """One optimizer step, or one evaluation of the validation file (then `full_valid_loss` is set).

    Losses are nats per trained token; `tokens` counts all tokens processed so far, and
    `tokens_per_second` trained ones. Non-finite values are None.
    """

    kind: Literal["metrics"] = "metrics"
    step: int
    total_steps: int
    epoch: float
    tokens: int
    seconds: float
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None


class Checkpoint(_Event):
    """A complete checkpoint was written to `path`: `adapter/` (plain PEFT) and the training state."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str
    metrics: dict[str, float | int | None]


class InitReport(_Event):
    """The initialization is done; `report` is the object shown as `job.init_report`."""

    kind: Literal["init_report"] = "init_report"
    report: dict[str, Any]


class Warned(Strict):
    """A warning about the result of a run that succeeded: a code of a closed list, a sentence, and its numbers."""

    code: Literal["worse_than_base", "worse_than_start", "no_effect"]
    message: str
    data: dict[str, float]


class Done(_Event):
    """The run succeeded. The adapter is in the folder `adapter`, and the export check has passed."""

    kind: Literal["done"] = "done"
    adapter: str
    trained_tokens: int
    export_check: dict[str, Any]
    resources: dict[str, Any]
    warnings: list[Warned] = []


class Halted(_Event):
    """The run has reached `RunSpec.stop_after`. The checkpoint of this step was reported before."""

    kind: Literal["halted"] = "halted"
    step: int


class Failed(_Event):
    """The run ended with an error that the caller should see. `may_pass`: another attempt may succeed."""

    kind: Literal["failed"] = "failed"
    code: str
    message: str
    param: str | None = None
    may_pass: bool = False


Event = Annotated[
    Stage | Tick | Message | Plan | Metrics | Checkpoint | InitReport | Done | Halted | Failed,
    Field(discriminator="kind"),
]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)
OnEvent = Callable[[Event], None]
