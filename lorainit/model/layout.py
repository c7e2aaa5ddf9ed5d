"""How rows share a forward pass of a model: packed, padded, or one by one. Decided by a trial (decision 0025).

The reference is the stock architecture with eager attention, one row at a time, because that is what other programs
compute. A layout is chosen if values and gradients of a few rows are the same in it, up to rounding. An error in a
trial only rules that layout out; the next one is tried.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lorainit.data.batches import Batch, Regime, collate, pack
from lorainit.data.dataset import Sample
from lorainit.model.forward import attention
from lorainit.model.forward.positions import chosen_tokens, regime_of
from lorainit.model.forward.probe import (
    MakeBatch,
    RowOutputs,
    Windows,
    convert_to_float32,
    find_windows,
    make_rows,
    measure_distances,
    run_rows,
    shorten_windows,
)
from lorainit.model.sharded_load import reset_failed_pass
from lorainit.runtime.devices import is_out_of_memory
from lorainit.runtime.machine_errors import is_machine_failure, is_missing_kernel

Rows = Literal["packed", "padded", "one by one"]

# In float32: relative distances of a token up to this are rounding.
EXACT = 1e-4
# In half precision: how far the median token may be from float32, as a multiple of the stock model's own distance. The
# median, because in a mixture of experts rounding sends some tokens to other experts.
TIMES_STOCK = 2.0
# Without memory for float32: how far the median token may be from the stock model in the same format. This is coarse,
# so it is also checked that gradients show no influence of one row on another.
BLIND = 0.1


@dataclass(frozen=True)
class Layout:
    """How rows share a pass, why not in a better way (None for packed rows), and which rows may share a pass."""

    rows: Rows
    why: str | None
    regime: Regime


@dataclass(frozen=True)
class _Trial:
    """A layout to try with an attention of this name; `layouts`: the kinds of batches that must be right with it."""

    rows: Rows
    attention: str
    layouts: Sequence[MakeBatch]


class _WrongResult(Exception):
    """A layout gives wrong results; the message says how."""


def choose_layout(model: Any) -> Layout:
    """Try the layouts, best first, and leave the model with the attention of the first correct one.

    Running out of memory does not rule a layout out. All layouts are then tried again without float32 copies, and if
    memory runs out again, the error is raised.

    Costs five passes forward and backward over 1 to 33 tokens (111 with windows), in half precision nine.
    """
    loaded = _attention_of(model)
    loaded = "eager" if loaded == attention.NAME else loaded  # the model was tried before and got our attention then
    try:
        return _choose(model, loaded, copy=True)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    _switch(model, loaded)
    return _choose(model, loaded, copy=False)


def _choose(model: Any, loaded: str, *, copy: bool, stock: str = "eager") -> Layout:
    regime, device = regime_of(model), next(model.parameters()).device
    packed, padded = partial(_pack_to, device=device), partial(_pad_to, device=device)
    # Padded batches must be right with our attention too, because initializations use them even if training packs.
    trials = [_Trial("packed", attention.NAME, (packed, padded)), _Trial("padded", loaded, (padded,))]
    trials += [] if loaded == stock else [_Trial("padded", "eager", (padded,))]
    why: list[str] = []
    windows = find_windows(model)
    if windows.beyond:
        _switch(model, loaded)
        return Layout(
            "one by one",
            f"what it does to {windows.beyond} tokens together cannot be tried on short rows",
            _never_shared,
        )
    try:
        check = _LayoutCheck(model, windows, regime, padded, stock=stock, copy=copy)
        for trial in trials:
            try:
                check.try_out(trial)
            except Exception as error:  # from a kernel or the architecture; whatever it is, this layout is ruled out
                if _is_machine_fault(error):
                    raise
                reset_failed_pass(model)
                why.append(_reason(error))
                # Falcon's eager attention adds ALiBi twice, so it is no reference. If eager and the default attention
                # differ, the default one becomes the reference, because that is what other programs use.
                if trial.attention == loaded != stock and check.contradicts(loaded):
                    return _choose(model, loaded, copy=copy, stock=loaded)
            else:
                return Layout(trial.rows, why[0] if why else None, regime)
    except Exception as error:
        if _is_machine_fault(error):
            raise
        reset_failed_pass(model)
        why.append(f"its stock attention could not be tried: {_reason(error)}")
    _switch(model, loaded)
    return Layout("one by one", "; padded: ".join(dict.fromkeys(why)), _never_shared)


def _is_machine_fault(error: Exception) -> bool:
    """Whether the machine caused the error. A kernel that was not built for this GPU does not count, because another
    layout may work without it."""
    return is_machine_failure(error) and not is_missing_kernel(error)


def _never_shared(_tokens: int) -> int | None:
    return None


def _pack_to(samples: Sequence[Sample], *, device: torch.device) -> Batch:
    return pack(samples).to(device)


def _pad_to(samples: Sequence[Sample], *, device: torch.device) -> Batch:
    return collate(samples, pad=0).to(device)


def _attention_of(model: Any) -> str:
    return str(model.config._attn_implementation)


def _switch(model: Any, name: str) -> None:
    if _attention_of(model) != name:
        model.set_attn_implementation(name)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    known = isinstance(error, (_WrongResult, attention.UnsupportedAttention))
    return text if known else f"the base does not run in this layout ({type(error).__name__}: {text})"


class _LayoutCheck:
    """The reference for a few rows, and the stock model's results for them in the model's own format."""

    def __init__(
        self, model: Any, windows: Windows, regime: Regime, make_batch: MakeBatch, *, stock: str, copy: bool
    ) -> None:
        self.model, self.windows, self.regime, self.copy = model, windows, regime, copy
        self.rows = make_rows(model, windows.longest)
        _switch(model, stock)
        self.alone = alone = partial(run_rows, model, make_batch=make_batch, size=1, regime=regime)
        whole = alone(self.rows[:1]).values[0] if windows.hidden else None
        with shorten_windows(windows):
            with convert_to_float32(model, copy=copy) as self.exact:
                self.truth = alone(self.rows)
            self.half = next(model.parameters()).dtype != torch.float32
            self.stock = alone(self.rows) if self.half and self.exact else self.truth
        self.unseen = windows.hidden if whole is not None and torch.equal(whole, self.stock.values[0]) else 0

    def try_out(self, trial: _Trial) -> None:
        """Raise an error if this layout is wrong."""
        if trial.attention == attention.NAME:
            if not getattr(self.model, "_supports_attention_backend", False):
                raise _WrongResult("this architecture does not let its attention be chosen")
            if chosen := chosen_tokens(self.model):
                raise _WrongResult(f"its attention chooses {chosen} tokens of a pass, whichever row they are of")
            if self.unseen:
                raise _WrongResult(f"its window of {self.unseen} tokens cannot be tried on short rows")
        _switch(self.model, trial.attention)
        with shorten_windows(self.windows):
            for make_batch in trial.layouts if self.exact else ():
                self._compare_exactly(make_batch, trial.rows)
            if self.half and self.exact:  # one layout is enough, because only the number format is new here
                self._compare_with_stock(trial.layouts[0], trial.rows)
            for make_batch in () if self.exact else trial.layouts:
                self._compare_without_float32(make_batch, trial.rows)

    def contradicts(self, attention: str) -> bool:
        """Whether single rows give other results with this attention than in the reference."""
        _switch(self.model, attention)
        with shorten_windows(self.windows), convert_to_float32(self.model, copy=self.copy):
            distance = measure_distances(self.alone(self.rows), self.truth)
        return not max(float(d.max() if self.exact else d.median()) for d in distance) <= (
            EXACT if self.exact else BLIND
        )

    def _see(self, make_batch: MakeBatch, only: Callable[[int], bool] = lambda _line: True) -> RowOutputs:
        return run_rows(self.model, self.rows, make_batch, size=len(self.rows), regime=self.regime, only=only)

    def _compare_exactly(self, make_batch: MakeBatch, rows: Rows) -> None:
        with convert_to_float32(self.model, copy=self.copy):
            found = self._see(make_batch)
        _require(measure_distances(found, self.truth), (EXACT, EXACT), rows, torch.max)

    def _compare_with_stock(self, make_batch: MakeBatch, rows: Rows) -> None:
        allowed = [TIMES_STOCK * float(d.median()) for d in measure_distances(self.stock, self.truth)]
        _require(measure_distances(self._see(make_batch), self.truth), allowed, rows, torch.median)

    def _compare_without_float32(self, make_batch: MakeBatch, rows: Rows) -> None:
        """Compare in the model's own format, coarsely, and check exactly that rows do not influence each other.

        The latter is exact because the gradient of one row's values with respect to another row must be zero.
        """
        _require(measure_distances(self._see(make_batch), self.truth), (BLIND, BLIND), rows, torch.median)
        for chosen in (True, False):
            found = self._see(make_batch, only=lambda line, chosen=chosen: (line == 0) == chosen)  # type: ignore[misc]
            if any(G.any() for row, G in zip(self.rows, found.gradients, strict=True) if (row.line == 0) != chosen):
                raise _WrongResult(f"{rows} rows see each other")


def _require(
    found: tuple[Tensor, Tensor], allowed: Sequence[float], rows: Rows, of: Callable[[Tensor], Tensor]
) -> None:
    for what, distance, limit in zip(("hidden states", "gradients"), found, allowed, strict=True):
        if not (off := float(of(distance))) <= limit:
            raise _WrongResult(f"{rows} rows changed its {what} by {off:.2g}, where {limit:.2g} is rounding")
