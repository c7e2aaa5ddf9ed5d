"""One adapter to train: what its run gave it, and what memory has made of its passes."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.config.events import Event, Message
from lorainit.config.spec import Hyperparameters
from lorainit.data.batches import Budget, Regime, any_length
from lorainit.data.dataset import Dataset, Sample
from lorainit.data.largest import Rows
from lorainit.model.forward.loss import NEXT_TOKEN, Objective
from lorainit.model.layers.layer import LoRALinear
from lorainit.train.checkpoint import Restored


@dataclass(frozen=True, kw_only=True)
class Member:
    """One adapter to train.

    `recipe` is resolved (no "auto" left). `budget` is what its part of one forward pass may hold, which
    changes speed and memory, not the gradient; `on_budget` hears how many tokens it has where that changes.
    `keeps_budget`: it is what an earlier attempt had, and memory is not measured again. `evaluates`: the most tokens of
    a pass over validation rows, where that is less.
    `recomputes`: an earlier attempt had to compute layers again; `on_recompute` hears that this one has to.
    `on_shortage` hears each time that memory has run out.
    `out` gets `metrics.jsonl` and `checkpoints/step-NNNNNN`. `skip`: batches of the data's order that are passed over
    before the first step. `regime`: which rows may share a forward pass. `objective`: what is minimized,
    the same of all that share a pass. For `checkpoint_recipe` and `write_adapter` see `checkpoint.write`.
    """

    layers: dict[str, LoRALinear]
    data: Dataset
    valid: Dataset | None
    recipe: Hyperparameters
    seed: int
    budget: Budget
    out: Path
    checkpoint_recipe: dict[str, Any]
    write_adapter: Callable[[Path], None]
    on_event: Callable[[Event], None]
    on_budget: Callable[[int], None] = lambda _tokens: None
    on_recompute: Callable[[], None] = lambda: None
    on_shortage: Callable[[], None] = lambda: None
    keeps_budget: bool = False
    evaluates: int = sys.maxsize
    recomputes: bool = False
    skip: int = 0
    regime: Regime = any_length
    objective: Objective = NEXT_TOKEN
    resumed: Restored | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for layer in self.layers.values() for p in layer.trained().values()]

    @property
    def evaluation_budget(self) -> Budget:
        """Of a pass over validation rows."""
        return self.budget._replace(tokens=min(self.budget.tokens, self.evaluates))

    def largest_pass(self) -> list[Sample]:
        """Rows that no pass of training is larger than."""
        return Rows(self.data.samples, self.budget.rows).largest_pass(self.budget)

    def largest_evaluation(self) -> list[Sample]:
        """Rows that no pass over validation rows is larger than."""
        assert self.valid is not None
        return Rows(self.valid.samples, self.budget.rows).largest_pass(self.evaluation_budget)


def halve_tokens(member: Member, largest: Sequence[Sample]) -> Member:
    """The member with half the tokens to a pass, which is said.

    Args:
        largest: the largest pass that its rows can make. Where a budget is wider, the half of it may change nothing.
    """
    before, tokens = member.budget.half_of(largest)
    text = (
        f"Memory ran out with passes over up to {before:,} tokens: {tokens:,} at most from here on, same effective"
        " batch"
    )
    say_shortage(member, text, tokens_per_pass=tokens)
    member.on_budget(tokens)
    return replace(member, budget=member.budget._replace(tokens=tokens))


def shrink_evaluations(member: Member, largest: Sequence[Sample]) -> Member:
    """The same for passes over validation rows alone: training has the passes that it had."""
    before, tokens = member.evaluation_budget.half_of(largest)
    text = (
        f"Memory ran out in an evaluation, with passes over up to {before:,} tokens: {tokens:,} at most from here on,"
        " the same rows"
    )
    say_shortage(member, text, tokens_per_pass=tokens, stage="evaluating")
    return replace(member, evaluates=tokens)


def say_shortage(member: Member, text: str, **facts: Any) -> None:
    """Tell that memory ran out, and what is done about it; it is counted."""
    member.on_event(Message(level="warn", message=text, data={"kind": "oom_retry", **facts}))
    member.on_shortage()


def clip(member: Member) -> Tensor:
    """Scale its gradients down to the recipe's norm; returns the norm that they had."""
    return torch.nn.utils.clip_grad_norm_(member.parameters, member.recipe.max_grad_norm or math.inf)
