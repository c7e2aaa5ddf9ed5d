"""`Run`: everything that one run works with, from its spec to its adapter.

`RunRequest` is what a caller asks for. `lorainit.prepare` makes a `Run` of it, in which every option is resolved.
Initialization, training and export get this object and store their results in it. A run reports only through `emit`.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorainit.config.events import Message, OnEvent, Plan
from lorainit.config.spec import Hyperparameters, Lora, RunSpec
from lorainit.data.batches import Budget, Regime, order_rows, split_into_batches
from lorainit.data.dataset import Dataset, Sample
from lorainit.data.largest import Rows
from lorainit.model.base import Base
from lorainit.model.forward.loss import NEXT_TOKEN, Objective
from lorainit.model.layers.layer import LoRALinear
from lorainit.model.passes import Passes
from lorainit.runtime.retry import any_rank


@dataclass(frozen=True)
class RunRequest:
    """One run of a group: its spec, a folder of its own (made if absent), and the function that gets its events."""

    spec: RunSpec
    out: Path
    on_event: OnEvent


@dataclass(frozen=True)
class Report:
    """`summary` is the object shown as `job.init_report`; `modules` has one entry per layer."""

    summary: dict[str, Any]
    modules: list[dict[str, Any]]


@dataclass(kw_only=True)
class Run:
    """What one run works with, everything resolved.

    `base`: the base model with its device and processes. All runs of a group share it.
    `samples`: the rows that an initialization looks at, from the calibration file or else from the training file.
    `passes`, `plan`: updated when memory forces smaller passes.
    `retries`: how often memory ran out.
    `alone`: no other run shares its process.
    `layers`: its adapter, empty until it is initialized. `report`: the report of that initialization.
    `early_check`: the result of `lorainit.export.early_check`, which shows that stock PEFT reads what this run
    exports; None = not shown.
    `evidence_tokens`, `evaluation_tokens`: the most tokens in a pass that collects evidence or evaluates validation
    rows; None = the limit of `passes`.
    """

    spec: RunSpec
    out: Path
    emit: OnEvent
    base: Base
    lora: Lora
    training: Hyperparameters
    data: Dataset
    targets: dict[str, nn.Module]
    passes: Passes
    plan: Plan
    valid: Dataset | None = None
    calibration: Dataset | None = None
    objective: Objective = NEXT_TOKEN
    alone: bool = True
    layers: dict[str, LoRALinear] = field(default_factory=dict)
    report: Report = field(default_factory=lambda: Report({}, []))
    early_check: dict[str, Any] | None = None
    retries: int = 0
    evidence_tokens: int | None = None
    evaluation_tokens: int | None = None
    started: float = field(default_factory=time.monotonic)

    # --- what it runs on -------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The frozen base, bare unless somebody has attached layers."""
        return self.base.model

    @property
    def device(self) -> torch.device:
        """The device that holds the base and the adapter."""
        return self.base.device

    @property
    def is_rank0(self) -> bool:
        """Whether this process emits events and writes files for all processes of the run."""
        return self.base.world.is_rank0

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true in any process of the run.

        Every process has to call this equally often, because each call waits for all of them.

        Raises:
            RanOutElsewhere: another process ran out of memory meanwhile (`lorainit.runtime.retry`).
        """
        return any_rank(flag, self.base.world, self.device)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for layer in self.layers.values() for p in layer.trained_parameters().values()]

    # --- rows, and how they share a pass ---------------------------------------------------------

    @property
    def samples(self) -> Sequence[Sample]:
        """Rows that an initialization looks at, in file order."""
        return (self.calibration or self.data).samples

    def order_rows(self, epoch: int) -> Sequence[int]:
        """Indices of the training rows in the order of this epoch. It depends on the run's seed."""
        return order_rows(self.data, seed=self.spec.seed, epoch=epoch)

    @property
    def regime(self) -> Regime:
        """Tells by their lengths which rows may share a pass."""
        return self.base.regime

    @property
    def budget(self) -> Budget:
        """The limit of a pass over padded rows."""
        return Budget(self.passes.rows, self.passes.tokens)

    @property
    def evidence_budget(self) -> Budget:
        """The limit of a pass that collects evidence. It is separate, so that halving it does not change training."""
        return Budget(self.passes.rows, self.evidence_tokens or self.passes.tokens)

    @property
    def training_budget(self) -> Budget:
        """The limit of a training pass."""
        return self.budget._replace(packed=self.base.packs)

    @property
    def evaluation_budget(self) -> Budget:
        """The limit of a pass over validation rows.

        It is separate, because validation rows are often few and long. Training in half of such a pass would be slow
        for the rest of the run (docs/decisions/0062).
        """
        tokens = self.passes.tokens
        return self.training_budget._replace(tokens=min(tokens, self.evaluation_tokens or tokens))

    def largest_pass(self) -> list[Sample]:
        """Rows that make a pass at least as large as any pass of training."""
        return Rows(self.data.samples, self.passes.rows).largest_pass(self.training_budget)

    def largest_evaluation(self) -> list[Sample]:
        """Rows that make a pass at least as large as any pass over validation rows."""
        assert self.valid is not None
        return Rows(self.valid.samples, self.passes.rows).largest_pass(self.evaluation_budget)

    @property
    def passes_of_first_step(self) -> int:
        """How many passes the first step takes. Other steps may take more or fewer, as their rows differ in length."""
        assert self.training.batch_size != "auto"
        first = self.order_rows(0)[: self.training.batch_size]
        return len(split_into_batches([self.data.samples[i] for i in first], self.training_budget, self.regime))

    # --- what memory makes of it, and its end ----------------------------------------------------

    def change_passes(self, **changes: int | bool) -> None:
        """Change the passes, and emit the plan again if its tokens per pass have changed."""
        self.passes = self.passes.model_copy(update=changes)
        tokens = self.plan.tokens_per_pass
        self.plan = self.plan.model_copy(update={"tokens_per_pass": self.passes.tokens})
        if tokens != self.passes.tokens:
            self.emit(self.plan)

    def halve_passes(self, largest: Sequence[Sample]) -> bool:
        """Halve the tokens of training passes from here on, and report it. A pass of one row cannot be halved.

        Args:
            largest: the largest pass that its rows can make. If the budget is larger than that, the tokens of this
                pass are halved instead, since half of the budget might change nothing.

        Returns:
            Whether they could be halved.
        """
        if len(largest) < 2:
            return False
        before, tokens = self.training_budget.half_of(largest)
        text = (
            f"Memory ran out with passes over up to {before:,} tokens: {tokens:,} at most from here on, same effective"
            " batch"
        )
        self.report_shortage(text, tokens_per_pass=tokens)
        self.change_passes(tokens=tokens)
        return True

    def halve_evaluations(self, largest: Sequence[Sample]) -> bool:
        """As `halve_passes`, for validation rows only. Training keeps its passes and so its exact numbers."""
        if len(largest) < 2:
            return False
        before, tokens = self.evaluation_budget.half_of(largest)
        text = (
            f"Memory ran out in an evaluation, with passes over up to {before:,} tokens: {tokens:,} at most from here"
            " on, the same rows"
        )
        self.report_shortage(text, tokens_per_pass=tokens, stage="evaluating")
        self.evaluation_tokens = tokens
        return True

    def halve_evidence(self, largest: Sequence[Sample]) -> bool:
        """As `halve_passes`, for the passes in which evidence is collected."""
        if len(largest) < 2:
            return False
        before, tokens = self.evidence_budget.half_of(largest)
        text = (
            f"Memory ran out while evidence was collected, with passes over up to {before:,} tokens: it is collected"
            f" again with {tokens:,} at most"
        )
        self.report_shortage(text, tokens_per_pass=tokens)
        self.evidence_tokens = tokens
        return True

    def report_shortage(self, text: str, **facts: Any) -> None:
        """Count that memory ran out, and report what is done about it."""
        self.emit(Message(level="warn", message=text, data={"kind": "oom_retry", **facts}))
        self.count_shortage()

    def count_shortage(self) -> None:
        """Count that memory ran out."""
        self.retries += 1

    def release_layers(self) -> None:
        """Drop the layers, because they hold parts of the base and would keep it in memory after its release."""
        self.targets.clear()
        self.layers.clear()

    @property
    def recipe(self) -> dict[str, Any]:
        """Hashes that a resumed run must have in common with the run that wrote the checkpoint.

        Fields that change no number are left out, so that a run may resume with another value of them.
        """
        resolved = {
            "lora": self.lora.model_dump(mode="json", exclude={"left_out"}),
            # `shard_base` is left out because dividing the base between devices changes no number.
            "training": self.training.model_dump(mode="json", exclude={"shard_base"}),
            "seed": self.spec.seed,
        }
        if self.spec.data.append_eos:
            resolved["append_eos"] = True
        return {
            "spec": hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest(),
            "data": self.data.sha256,
            "validation": self.valid.sha256 if self.valid else None,
            "calibration": self.calibration.sha256 if self.calibration else None,
            "base": self.base.sha256,
        }
