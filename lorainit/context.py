"""One run from its spec to its adapter: everything that it works with, in one object with a lifetime.

`RunRequest` is what somebody asks for. `lorainit.prepare` makes a `Run` of it once, fully resolved, and everybody after
that is handed the run: initialization, training, export. What they find out is put back into it. `emit` is the only
way in which a run speaks.
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
from lorainit.data.batches import Budget, Regime, batches, order
from lorainit.data.dataset import Dataset, Sample
from lorainit.data.largest import Rows
from lorainit.model.base import Base
from lorainit.model.forward.loss import NEXT_TOKEN, Objective
from lorainit.model.layers.layer import LoRALinear
from lorainit.model.passes import Passes
from lorainit.runtime.retry import any_rank


@dataclass(frozen=True)
class RunRequest:
    """One run of a group: its spec, a folder of its own (made if absent), and who is told."""

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

    `base`: shared by all runs of a group, and with it device and processes. `samples`: the rows that an initialization
    looks at, those of the calibration file or else of the training file. `passes`, `plan`: as memory has made them.
    `retries`: how often memory ran out. `alone`: no other run shares its process.
    `layers`: its adapter, once it is initialized; `report`: how. `early_check`: how it was shown that stock PEFT reads
    what this run exports (`lorainit.export.early_check`); None = not shown.
    `evidence_tokens`, `evaluation_tokens`: at most so many in a pass that collects evidence, or looks at validation
    rows; None = as `passes` has it.
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
        """Where the base and the adapter are."""
        return self.base.device

    @property
    def is_rank0(self) -> bool:
        """Whether this process speaks and writes for all processes of the run."""
        return self.base.world.is_rank0

    def any_rank(self, flag: bool) -> bool:
        """Whether it is so in any process of the run; all ask equally often (`lorainit.runtime.retry`).

        Raises:
            RanOutElsewhere: one of them ran out of memory meanwhile.
        """
        return any_rank(flag, self.base.world, self.device)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for layer in self.layers.values() for p in layer.trained().values()]

    # --- rows, and how they share a pass ---------------------------------------------------------

    @property
    def samples(self) -> Sequence[Sample]:
        """Rows that an initialization looks at, in file order."""
        return (self.calibration or self.data).samples

    def order(self, epoch: int) -> Sequence[int]:
        """The run's own permutation of the training rows."""
        return order(self.data, seed=self.spec.seed, epoch=epoch)

    @property
    def regime(self) -> Regime:
        """Which rows may share a pass."""
        return self.base.regime

    @property
    def budget(self) -> Budget:
        """Of a pass over padded rows."""
        return Budget(self.passes.rows, self.passes.tokens)

    @property
    def evidence_budget(self) -> Budget:
        """Of a pass that collects evidence."""
        return Budget(self.passes.rows, self.evidence_tokens or self.passes.tokens)

    @property
    def training_budget(self) -> Budget:
        """Of a pass of training."""
        return self.budget._replace(packed=self.base.packs)

    @property
    def evaluation_budget(self) -> Budget:
        """Of a pass over validation rows."""
        tokens = self.passes.tokens
        return self.training_budget._replace(tokens=min(tokens, self.evaluation_tokens or tokens))

    def largest_pass(self) -> list[Sample]:
        """Rows that no pass of training is larger than."""
        return Rows(self.data.samples, self.passes.rows).largest_pass(self.training_budget)

    def largest_evaluation(self) -> list[Sample]:
        """Rows that no pass over validation rows is larger than."""
        assert self.valid is not None
        return Rows(self.valid.samples, self.passes.rows).largest_pass(self.evaluation_budget)

    @property
    def passes_of_first_step(self) -> int:
        """How many; of other steps it differs a little with the lengths of their rows."""
        assert self.training.batch_size != "auto"
        first = self.order(0)[: self.training.batch_size]
        return len(batches([self.data.samples[i] for i in first], self.training_budget, self.regime))

    # --- what memory makes of it, and its end ----------------------------------------------------

    def change_passes(self, **changes: int | bool) -> None:
        """Note what memory has made of the passes, and tell the plan again where that changes it."""
        self.passes = self.passes.model_copy(update=changes)
        tokens = self.plan.tokens_per_pass
        self.plan = self.plan.model_copy(update={"tokens_per_pass": self.passes.tokens})
        if tokens != self.passes.tokens:
            self.emit(self.plan)

    def halve_passes(self, largest: Sequence[Sample]) -> None:
        """Passes of training have half the tokens from here on; it is reported.

        Args:
            largest: the largest pass that its rows can make. Where a budget is wider, half of it may change nothing.
        """
        before, tokens = self.training_budget.half_of(largest)
        text = (
            f"Memory ran out with passes over up to {before:,} tokens: {tokens:,} at most from here on, same effective"
            " batch"
        )
        self.report_shortage(text, tokens_per_pass=tokens)
        self.change_passes(tokens=tokens)

    def halve_evaluations(self, largest: Sequence[Sample]) -> None:
        """The same for passes over validation rows alone: training has the passes that it had."""
        before, tokens = self.evaluation_budget.half_of(largest)
        text = (
            f"Memory ran out in an evaluation, with passes over up to {before:,} tokens: {tokens:,} at most from here"
            " on, the same rows"
        )
        self.report_shortage(text, tokens_per_pass=tokens, stage="evaluating")
        self.evaluation_tokens = tokens

    def report_shortage(self, text: str, **facts: Any) -> None:
        """Report that memory ran out, and what is done about it; it is counted."""
        self.emit(Message(level="warn", message=text, data={"kind": "oom_retry", **facts}))
        self.count_shortage()

    def count_shortage(self) -> None:
        """Memory has run out."""
        self.retries += 1

    def release_layers(self) -> None:
        """Keep no part of the base in memory when others let go of it."""
        self.targets.clear()
        self.layers.clear()

    @property
    def recipe(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that wrote the checkpoint."""
        resolved = {
            "lora": self.lora.model_dump(mode="json", exclude={"left_out"}),
            # Whether devices share the base changes no number.
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
