"""What the targets are fed: principal directions of their inputs (EVA), or second moments (CorDA).

One forward pass per batch serves all layers, and layers that are handed the very same tensor (the
query, key and value projections of a block) share one computation. Padding is never looked at.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lorainit.batches import batches, collate
from lorainit.data import Sample
from lorainit.errors import InitFailed, UnsupportedInit
from lorainit.events import Message, Tick
from lorainit.evidence import Evidence, memory
from lorainit.evidence.context import Context, few_rows
from lorainit.evidence.pca import PCA, converged, spread_ranks
from lorainit.hardware import generator_for
from lorainit.inits import EVA, CorDA
from lorainit.loss import logits_of
from lorainit.methods.eva import alive_directions
from lorainit.model.experts import ExpertLinear
from lorainit.model.names import listed
from lorainit.weight import shape_of

# A pass over the rows is finished before convergence counts; then the rows are seen again at most so often.
MAX_PASSES, MIN_BATCHES = 8, 64
# Second moments that lie on an accelerator at a time; more of them take one more pass over the rows.
DEVICE_BYTES = 4 << 30

See = Callable[[str, Tensor, list[int]], None]


# --- EVA ---------------------------------------------------------------------------------------


def principal_directions(config: EVA, context: Context) -> dict[str, Evidence]:
    """Principal directions of each layer's inputs, and the rank each layer deserves.

    The inputs are those of trained tokens (`use_label_mask`, PEFT's default) or of all but padding. Each of the first
    `samples` rows is seen once, then they are seen again until every assigned direction stands
    still from one batch to the next (`converged`). The sum of the ranks is r times the number of
    layers, and no layer gets more than rho·r.

    Experts of a mixture that too few tokens reach, or whose directions alone do not settle, are `starved` and take
    no part in the spreading.

    Raises:
        UnsupportedInit: a layer's inputs cannot be masked, or too few tokens reach it.
        InitFailed: the directions have not converged; the message lists the layers.
        OutOfMemory: they take more than is free.
    """
    rows = calibration_rows(config, context)
    pieces = batches(rows, context.micro_batch_size, context.regime)
    leader = shared_inputs(context, pieces[0])
    widths = {n: min(round(config.rho * context.lora.r), *shape_of(m)) for n, m in context.targets.items()}
    # The directions, and those of the batch before.
    numbers = 2 * sum(widths[g] * shape_of(context.targets[g])[1] for g in dict.fromkeys(leader.values()))
    memory.require(context, "eva's directions of every layer's inputs", numbers=numbers, device=context.device)
    states = _states(config, context, leader, widths)
    ranks = _settle(states, leader, widths, pieces, config=config, context=context)
    starved = Evidence(starved=True, rows=len(rows))
    return {
        n: _eva_evidence(states[leader[n]], ranks[n], rows=len(rows)) if n in ranks else starved
        for n in context.targets
    }


def _settle(
    states: dict[str, PCA],
    leader: dict[str, str],
    widths: dict[str, int],
    pieces: Sequence[Sequence[Sample]],
    *,
    config: EVA,
    context: Context,
) -> dict[str, int]:
    """Feed the batches, again and again, until the directions stand still; the ranks they earn."""
    limit, tokens = max(MIN_BATCHES, MAX_PASSES * len(pieces)), "trained" if config.use_label_mask else "all"
    moving: list[str] = []
    for number in range(1, limit + 1):
        before = {name: state.directions for name, state in states.items()}
        piece = pieces[(number - 1) % len(pieces)]
        _forward(context, piece, states, lambda name, X, _: states[name].update(X), tokens=tokens)
        context.on_event(Tick(done=number, total=limit))
        if number == len(pieces):
            leader = _without(_starved_experts(states, widths, context), leader, states)
            _refuse_starved({name: states[leader[name]] for name in leader}, widths)
        if number < max(2, len(pieces)):
            continue
        bids = {name: states[leader[name]].ratios[: widths[name]] for name in leader}
        ranks = spread_ranks(bids, context.lora.r * len(leader))
        needed = {g: max(ranks[name] for name in leader if leader[name] == g) for g in states}
        moving = [g for g, state in states.items() if not converged(before[g], state.directions, needed[g], config.tau)]
        if not context.anybody(bool(moving)):  # rounding may differ, and passes may be everybody's
            _say_ranks(ranks, number, context)
            return ranks
    unsettled = [name for name in moving if not isinstance(context.targets[name], ExpertLinear)]
    if not unsettled:  # experts that few tokens reach
        leader = _without(moving, leader, states)
        return spread_ranks({n: states[leader[n]].ratios[: widths[n]] for n in leader}, context.lora.r * len(leader))
    raise InitFailed(
        f"EVA's directions still move after {limit} batches in {listed(unsettled)}: more rows, larger micro-batches or"
        f" a lower tau than {config.tau:g} help.",
        param="lora.init.tau",
    )


def _states(config: EVA, context: Context, leader: dict[str, str], widths: dict[str, int]) -> dict[str, PCA]:
    seed = config.seed_for(context.seed)
    return {
        g: PCA(max(widths[n] for n in leader if leader[n] == g), generator=generator_for(seed, g))
        for g in dict.fromkeys(leader.values())
    }


def _eva_evidence(state: PCA, rank: int, *, rows: int) -> Evidence:
    V, S = state.directions[:rank].cpu(), state.S[:rank].cpu()
    facts = {"explained_variance": float(state.ratios[:rank].sum())}
    return Evidence(directions=V, spread=S, rank=rank, rows=rows, facts=facts)


def _starved_experts(states: dict[str, PCA], widths: dict[str, int], context: Context) -> list[str]:
    """Experts that too few tokens were routed to, or too few different ones, for as many directions."""
    return [
        name
        for name, state in states.items()
        if isinstance(context.targets[name], ExpertLinear)
        and (state.tokens <= widths[name] or alive_directions(state.S) < widths[name])
    ]


def _without(experts: Sequence[str], leader: dict[str, str], states: dict[str, PCA]) -> dict[str, str]:
    """The leaders of all others; `states` forgets these experts too."""
    for name in experts:
        del states[name]
    return {name: g for name, g in leader.items() if name not in experts}


def _refuse_starved(states: dict[str, PCA], widths: dict[str, int]) -> None:
    starved = [name for name, state in states.items() if state.tokens <= widths[name]]
    if starved:
        fewest = min(states[name].tokens for name in starved)
        raise UnsupportedInit(
            f"EVA needs more tokens to look at than directions, and {listed(starved)} got {fewest}: more or longer"
            " calibration rows, or a smaller r.",
            param="lora.init.samples",
        )


def _say_ranks(ranks: dict[str, int], seen: int, context: Context) -> None:
    empty = [name for name, rank in ranks.items() if rank == 0]
    text = (
        f"EVA: directions stand still after {seen} batches; ranks from {min(ranks.values())} to {max(ranks.values())}"
    )
    text += f"; {len(empty)} modules get no adapter" if empty else ""
    data = {"kind": "init", "batches": seen, "without_adapter": empty}
    context.on_event(Message(message=text, data=data))


# --- CorDA -------------------------------------------------------------------------------------


def second_moments(config: CorDA, context: Context) -> dict[str, Evidence]:
    """Mean over rows of XᵀX for each layer, in×in float32, X the row's inputs over their size (`_size`).

    Held on the CPU: in² · 4 bytes for every group of layers that share an input. On an accelerator
    a few GiB of them lie at a time, at the price of one more pass over the rows for each block.
    Experts of a mixture share no input; those that no token reaches are `starved`.

    Raises:
        UnsupportedInit: a layer's inputs cannot be masked, or none reach it.
        InitFailed: a layer's inputs are not finite.
        OutOfMemory: more than is free.
    """
    rows = calibration_rows(config, context)
    pieces = batches(rows, context.micro_batch_size, context.regime)
    leader = shared_inputs(context, pieces[0])
    sides = {g: shape_of(context.targets[g])[1] for g in dict.fromkeys(leader.values())}
    moments: dict[str, Tensor] = {}
    what, numbers = "corda's second moment of every layer's inputs", sum(n * n for n in sides.values())
    memory.require(context, what, numbers=numbers, device=torch.device("cpu"))
    blocks = _blocks(sides, DEVICE_BYTES if context.device.type != "cpu" else None)
    for done, block in enumerate(blocks):
        for number, piece in enumerate(pieces, start=1):
            _forward(context, piece, block, partial(_add_moments, moments, config), tokens="all")
            context.on_event(Tick(done=done * len(pieces) + number, total=len(blocks) * len(pieces)))
        for name in moments.keys() & block:
            moments[name] = (moments[name] / len(rows)).cpu()
    silent = [name for name in sides if name not in moments or not moments[name].any()]
    starved = {name for name in silent if isinstance(context.targets[name], ExpertLinear)}
    _refuse_moments(moments, [name for name in silent if name not in starved])
    return {
        name: Evidence(starved=True, rows=len(rows))
        if name in starved
        else Evidence(second_moment=moments[g], rows=len(rows))
        for name, g in leader.items()
    }


def _add_moments(sums: dict[str, Tensor], config: CorDA, name: str, X: Tensor, counts: list[int]) -> None:
    for row in torch.split_with_sizes(X, counts):
        if not len(row):  # no token of this row was routed to the expert
            continue
        scaled = row / _size(row, config).clamp(min=torch.finfo(row.dtype).tiny)
        C = scaled.T @ scaled
        sums[name] = sums[name].add_(C) if name in sums else C


def _size(row: Tensor, config: CorDA) -> Tensor:
    """What a row's inputs are divided by: their largest |entry|, or, as the authors do, |their largest entry|."""
    return row.max().abs() if config.balance == "authors" else row.abs().max()


def _blocks(sides: dict[str, int], limit: int | None) -> list[list[str]]:
    """Consecutive layers whose moments fit together into `limit` bytes (None = no limit)."""
    blocks: list[list[str]] = [[]]
    used = 0
    for name, n in sides.items():
        used += 4 * n * n
        if limit is not None and used > limit and blocks[-1]:
            blocks.append([])
            used = 4 * n * n
        blocks[-1].append(name)
    return blocks


def _refuse_moments(moments: dict[str, Tensor], silent: list[str]) -> None:
    if silent:
        raise UnsupportedInit(f"No input but zeros reached {listed(silent)}.", param="lora.init")
    broken = [name for name, C in moments.items() if not C.isfinite().all()]
    if broken:
        raise InitFailed(
            f"The second moment of the inputs is not finite in {listed(broken)}: the largest entry of a row is next"
            ' to zero, and the authors\' rule divides by it. With balance "equal" it is the largest absolute entry.',
            param="lora.init.balance",
        )


# --- both --------------------------------------------------------------------------------------


def calibration_rows(config: EVA | CorDA, context: Context) -> Sequence[Sample]:
    """The first rows; refused when there are none. Fewer than asked for is said aloud."""
    rows = context.samples[: config.samples]
    if not rows:
        raise UnsupportedInit("This method looks at rows, and there are none.", param="data.calibration")
    if len(rows) < config.samples:
        context.on_event(few_rows(config, len(rows)))
    return rows


def shared_inputs(context: Context, piece: Sequence[Sample]) -> dict[str, str]:
    """For each target the first target that is handed the very same tensor; itself if it is the first.

    Experts share nothing, and whether tokens reach them is known when all rows have passed.

    Raises:
        UnsupportedInit: a target is not reached at all.
    """
    # The tensors are kept until the pass is over, so that an identity cannot be used twice.
    seen: dict[int, tuple[str, Tensor]] = {}
    leader = {name: name for name, module in context.targets.items() if isinstance(module, ExpertLinear)}
    others = {name: module for name, module in context.targets.items() if name not in leader}

    def note(name: str, x: Tensor) -> None:
        leader.setdefault(name, seen.setdefault(id(x), (name, x))[0])

    batch = collate(piece, pad=context.pad).to(context.device)
    with torch.no_grad(), _hooked(others, note):
        logits_of(context.model, batch)
    unreached = [name for name in context.targets if name not in leader]
    if unreached:
        raise UnsupportedInit(f"The calibration rows never reach {listed(unreached)}.", param="lora.target_modules")
    return {name: leader[name] for name in context.targets}


@torch.no_grad()
def _forward(
    context: Context, piece: Sequence[Sample], names: Sequence[str] | dict[str, PCA], see: See, *, tokens: str
) -> None:
    """One batch; `see(name, X, counts)` gets the chosen tokens' inputs of each named target, tokens×in float32.

    `counts`: how many of them are each row's, in turn.
    """
    batch = collate(piece, pad=context.pad).to(context.device)
    mask = batch.attention.bool() & batch.trained if tokens == "trained" else batch.attention.bool()

    def select(name: str, x: Tensor) -> None:
        positions = _positions(name, context.targets[name], x, mask)
        wanted = mask.flatten()[positions]
        X = x.flatten(0, -2)[wanted].float()
        if not X.isfinite().all():
            raise InitFailed(f"{name}: its inputs are not finite on the calibration rows.", param="lora.init")
        see(name, X, torch.bincount(positions[wanted] // mask.shape[1], minlength=len(mask)).tolist())

    with _hooked({name: context.targets[name] for name in names}, select):
        logits_of(context.model, batch)


def _positions(name: str, module: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Where in the flattened rows×length the tokens of a layer's input stand, in ascending order."""
    if isinstance(module, ExpertLinear) and module.stack.of == mask.numel():
        assert module.stack.tokens is not None
        return module.stack.tokens
    # Latent attention hands its keys on with an axis for the one head that all share: rows×1×tokens×features.
    shared_head = x.ndim == 4 and (x.shape[0], *x.shape[2:-1]) == mask.shape and x.shape[1] == 1
    known = shared_head or x.shape[:-1] in (mask.shape, (mask.numel(),))
    if known and not isinstance(module, ExpertLinear):
        return torch.arange(mask.numel(), device=mask.device)
    raise UnsupportedInit(
        f"{name}: its inputs come as {tuple(x.shape)}, not as rows x tokens x features: which of them are"
        " padding cannot be told.",
        param="lora.target_modules",
    )


@contextmanager
def _hooked(targets: dict[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, input)` before each target runs."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: see(name, args[0])

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in targets.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
