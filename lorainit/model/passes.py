"""How steps are divided into forward passes, and what a resumed run keeps of that.

The loss does not depend on it, but dropout and the order of sums do, so a resumed run keeps the division if possible.
Limits from the spec are kept unless the resumed spec has other ones. Limits that came from lack of memory are kept on a
device of the same kind; on another device they are decided again, as in a new run (decision 0059).
"""

from typing import Any

from pydantic import Field, ValidationError

from lorainit.config.errors import CheckpointMismatch
from lorainit.config.schema import Strict
from lorainit.config.spec import RunSpec
from lorainit.model.base import Base
from lorainit.runtime import devices

# The default limits of one forward pass. On a GPU more tokens would hardly be faster, and `lorainit.train.memory`
# reduces the limit if they do not fit.
TOKENS_PER_PASS = {"cpu": 2048, "cuda": 16384}
MAX_ROWS_PER_PASS = {"cpu": 8, "cuda": 256}
SAME_MEMORY = 0.02  # devices of one name may differ by this share, because drivers reserve different amounts


class Asked(Strict):
    """The limits that the spec sets: the most rows and tokens of a pass; None = no limit was set."""

    rows: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)


class Begun(Strict):
    """The limits of a pass before lack of memory could reduce them, and the device.

    `memory`: bytes of the device, 0 = unknown, as for a CPU. `parts`: how many devices share a sharded base, else 1.
    """

    rows: int
    tokens: int
    device: str
    memory: int
    parts: int

    def is_like(self, other: "Begun") -> bool:
        """Whether memory would reduce both to the same limits.

        On a CPU the number of tokens is ignored, so that a run that leaves its group keeps its share of the tokens and
        thereby gives the same bits as promised. On a GPU equal bits are not promised, so the run may use the tokens
        that the others have left.
        """
        near = abs(self.memory - other.memory) <= SAME_MEMORY * self.memory
        tokens = self.tokens if other.memory else other.tokens
        return near and self.model_copy(update={"tokens": tokens, "memory": 0}) == other.model_copy(
            update={"memory": 0}
        )


class Passes(Strict):
    """The most rows and tokens of a pass, and where these limits come from.

    `recomputed`: layers are computed again in the backward pass, because one row did not fit otherwise.
    `kept`: taken over from an earlier attempt, so memory is not measured again.
    """

    asked: Asked
    begun: Begun
    rows: int = Field(ge=1)
    tokens: int = Field(ge=1)
    recomputed: bool = False
    kept: bool = False

    def answer(self, now: Asked) -> bool:
        """Whether these passes satisfy the resumed spec's limits: unset, the same as before, or as the passes began."""
        return now.rows in (None, self.asked.rows, self.begun.rows) and now.tokens in (
            None,
            self.asked.tokens,
            self.begun.tokens,
        )


def begin(asked: Asked, base: Base, *, batch_size: int, sharing: int, one_by_one: bool) -> Passes:
    """The passes of a new run.

    Args:
        sharing: how many runs share a forward pass; its tokens are divided among them.
    """
    kind = base.device.type
    rows = 1 if one_by_one else min(asked.rows or _rows_for_all(batch_size, MAX_ROWS_PER_PASS[kind], base), batch_size)
    tokens = max(1, (asked.tokens or TOKENS_PER_PASS[kind]) // sharing)
    device, memory = devices.name_and_memory(base.device)
    parts = base.world.size if base.sharded else 1
    begun = Begun(rows=rows, tokens=tokens, device=device, memory=memory, parts=parts)
    return Passes(asked=asked, begun=begun, rows=rows, tokens=tokens)


def _rows_for_all(batch_size: int, most: int, base: Base) -> int:
    """The most rows of a pass, reduced if a step would have fewer passes than processes, because some would be idle.

    Otherwise it does not depend on the number of processes, so that passes and dropout do not depend on it either.
    """
    return most if -(-batch_size // most) >= base.world.size else -(-batch_size // base.world.size)


def go_on(spec: RunSpec, base: Base, known: dict[str, Any] | None, *, batch_size: int, sharing: int) -> Passes:
    """The passes of a run that starts or resumes.

    Args:
        known: the passes in the manifest of the checkpoint to resume from; None for a new run.

    Raises:
        CheckpointMismatch: they cannot be read.
    """
    before = None if known is None else _read(known)
    now, earlier = Asked(rows=spec.micro_batch_size, tokens=spec.tokens_per_pass), before.asked if before else Asked()
    asked = Asked(rows=now.rows or earlier.rows, tokens=now.tokens or earlier.tokens)
    new = begin(asked, base, batch_size=batch_size, sharing=sharing, one_by_one=base.layout.rows == "one by one")
    alike = before is not None and before.answer(now) and new.begun.is_like(before.begun)
    # All processes must decide the same, and they may have different devices: if one decides again, all do.
    if before is None or base.world.any_rank(not alike, base.device):
        return new
    return before.model_copy(update={"asked": asked, "kept": True})


def _read(known: dict[str, Any]) -> Passes:
    try:
        return Passes.model_validate(known)
    except ValidationError as error:
        text = f"The passes in the checkpoint's manifest cannot be read: {error.errors()[0]['msg']}."
        raise CheckpointMismatch(text, param="resume_from") from error
