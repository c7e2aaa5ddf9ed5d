"""How steps are cut into forward passes, and what a run that goes on from a checkpoint keeps of that.

Nothing that is minimized depends on it, but dropout and the order of sums do. What somebody asked for is kept unless
the spec that goes on asks for something else. What memory decided is kept where passes would begin as they did, on a
device like that one; elsewhere it is decided anew, as at a start (decision 0059).
"""

from typing import Any

from pydantic import Field, ValidationError

from lorainit.config.errors import CheckpointMismatch
from lorainit.config.schema import Strict
from lorainit.config.spec import RunSpec
from lorainit.model.base import Base
from lorainit.runtime import devices

# The most of one forward pass, where nobody says. On a GPU more tokens would hardly be faster, and
# `lorainit.train.memory` measures how many fit.
TOKENS_PER_PASS = {"cpu": 2048, "cuda": 16384}
MAX_ROWS_PER_PASS = {"cpu": 8, "cuda": 256}
SAME_MEMORY = 0.02  # of two devices of one name, whose drivers may keep some of it


class Asked(Strict):
    """What somebody asked for, None = nobody: the most rows and tokens of a pass."""

    rows: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)


class Begun(Strict):
    """The most rows and tokens of a pass before memory had a say, and the device whose memory that was.

    `memory`: bytes, 0 = not known, as of a CPU. `parts`: devices that divide the base.
    """

    rows: int
    tokens: int
    device: str
    memory: int
    parts: int

    def is_like(self, other: "Begun") -> bool:
        """Whether memory would decide the same of both.

        A CPU is not asked for its memory. There a run that leaves its group keeps its part of the tokens, and so the
        bits that are promised; on a GPU, where none are, it gets the room that others have left.
        """
        near = abs(self.memory - other.memory) <= SAME_MEMORY * self.memory
        tokens = self.tokens if other.memory else other.tokens
        return near and self.model_copy(update={"tokens": tokens, "memory": 0}) == other.model_copy(
            update={"memory": 0}
        )


class Passes(Strict):
    """The most rows and tokens of a pass, and how that came about.

    `recomputed`: layers are computed again in the backward pass, because one row did not fit otherwise.
    `kept`: as an earlier attempt had it, so memory is not asked again.
    """

    asked: Asked
    begun: Begun
    rows: int = Field(ge=1)
    tokens: int = Field(ge=1)
    recomputed: bool = False
    kept: bool = False

    def answer(self, now: Asked) -> bool:
        """Whether these are passes that somebody who asks for this gets: as asked before, or as they began."""
        return now.rows in (None, self.asked.rows, self.begun.rows) and now.tokens in (
            None,
            self.asked.tokens,
            self.begun.tokens,
        )


def begin(asked: Asked, base: Base, *, batch_size: int, sharing: int, one_by_one: bool) -> Passes:
    """The passes of a run that starts.

    Args:
        sharing: how many runs share a forward pass, and so its tokens.
    """
    kind = base.device.type
    rows = 1 if one_by_one else min(asked.rows or _rows_for_all(batch_size, MAX_ROWS_PER_PASS[kind], base), batch_size)
    tokens = max(1, (asked.tokens or TOKENS_PER_PASS[kind]) // sharing)
    device, memory = devices.name_and_memory(base.device)
    parts = base.world.size if base.sharded else 1
    begun = Begun(rows=rows, tokens=tokens, device=device, memory=memory, parts=parts)
    return Passes(asked=asked, begun=begun, rows=rows, tokens=tokens)


def _rows_for_all(batch_size: int, most: int, base: Base) -> int:
    """The most rows of a pass, so that a step has one for each process: those without one would be idle.

    Where it has as many anyway passes are those of any number of processes, and so is dropout.
    """
    return most if -(-batch_size // most) >= base.world.size else -(-batch_size // base.world.size)


def go_on(spec: RunSpec, base: Base, known: dict[str, Any] | None, *, batch_size: int, sharing: int) -> Passes:
    """The passes of a run.

    Args:
        known: those of the checkpoint that it goes on from, as its manifest has them.

    Raises:
        CheckpointMismatch: they cannot be read.
    """
    before = None if known is None else _read(known)
    now, earlier = Asked(rows=spec.micro_batch_size, tokens=spec.tokens_per_pass), before.asked if before else Asked()
    asked = Asked(rows=now.rows or earlier.rows, tokens=now.tokens or earlier.tokens)
    new = begin(asked, base, batch_size=batch_size, sharing=sharing, one_by_one=base.layout.rows == "one by one")
    alike = before is not None and before.answer(now) and new.begun.is_like(before.begun)
    # Processes may have different devices; where one of them decides anew all have to.
    if before is None or base.world.any_rank(not alike, base.device):
        return new
    return before.model_copy(update={"asked": asked, "kept": True})


def _read(known: dict[str, Any]) -> Passes:
    try:
        return Passes.model_validate(known)
    except ValidationError as error:
        text = f"The checkpoint's manifest says nothing that can be read of its passes: {error.errors()[0]['msg']}."
        raise CheckpointMismatch(text, param="resume_from") from error
