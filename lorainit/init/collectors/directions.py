"""Principal directions of the targets' inputs (EVA), and the rank of each target that follows from them."""

from collections.abc import Sequence

from lorainit.config.errors import InitFailed, UnsupportedInit
from lorainit.config.events import Message, Tick
from lorainit.config.inits.data import EVA
from lorainit.context import Run
from lorainit.data.batches import split_into_batches
from lorainit.data.dataset import Sample
from lorainit.init.collectors import memory
from lorainit.init.collectors.inputs import choose_calibration_rows, collect_inputs, find_shared_inputs
from lorainit.init.collectors.pca import PCA, has_converged, spread_ranks
from lorainit.init.evidence import Evidence
from lorainit.init.methods.eva import alive_directions
from lorainit.model.layers.experts import ExpertLinear
from lorainit.model.layers.weight import shape_of
from lorainit.model.targets.names import list_first
from lorainit.runtime.devices import make_generator

# The rows are repeated until the directions converge, at most `MAX_PASSES` times. With few batches that would be too
# few updates, so at least `MIN_BATCHES` batches are allowed.
MAX_PASSES, MIN_BATCHES = 8, 64


def collect_principal_directions(config: EVA, run: Run) -> dict[str, Evidence]:
    """Principal directions of each layer's inputs, and the rank of each layer.

    The inputs are those of trained tokens (`use_label_mask`, PEFT's default) or of all tokens but padding. Each of the
    first `samples` rows is used once. Then they are repeated until no direction that is needed changes from one batch
    to the next (`has_converged`). The sum of the ranks is r times the number of layers, and no layer gets more than
    rho·r.

    An expert is `starved` if too few tokens reach it, or if all other layers have converged and it has not. It then
    gets no share of the ranks.

    Raises:
        UnsupportedInit: a layer's inputs cannot be masked, or too few tokens reach it.
        InitFailed: the directions have not converged; the message lists the layers.
        OutOfMemory: they take more than is free.
    """
    rows = choose_calibration_rows(config, run)
    pieces = split_into_batches(rows, run.evidence_budget, run.regime)
    leader = find_shared_inputs(run, pieces[0])
    widths = {n: min(round(config.rho * run.lora.r), *shape_of(m)) for n, m in run.targets.items()}
    # Twice, because the directions before a batch are kept to compare them with those after it.
    numbers = 2 * sum(widths[g] * shape_of(run.targets[g])[1] for g in dict.fromkeys(leader.values()))
    memory.require_memory(run, "eva's directions of every layer's inputs", numbers=numbers, device=run.device)
    states = _states(config, run, leader, widths)
    ranks = _run_until_converged(states, leader, widths, pieces, config=config, run=run)
    starved = Evidence(starved=True, rows=len(rows))
    return {
        n: _eva_evidence(states[leader[n]], ranks[n], rows=len(rows)) if n in ranks else starved for n in run.targets
    }


def _run_until_converged(
    states: dict[str, PCA],
    leader: dict[str, str],
    widths: dict[str, int],
    pieces: Sequence[Sequence[Sample]],
    *,
    config: EVA,
    run: Run,
) -> dict[str, int]:
    """Update the directions batch by batch until they converge. Returns the rank of each layer."""
    limit, tokens = max(MIN_BATCHES, MAX_PASSES * len(pieces)), "trained" if config.use_label_mask else "all"
    moving: list[str] = []
    for number in range(1, limit + 1):
        before = {name: state.directions for name, state in states.items()}
        piece = pieces[(number - 1) % len(pieces)]
        collect_inputs(run, piece, states, lambda name, X, _: states[name].update(X), tokens=tokens)
        run.emit(Tick(done=number, total=limit))
        if number == len(pieces):
            leader = _without(_starved_experts(states, widths, run), leader, states)
            _refuse_starved({name: states[leader[name]] for name in leader}, widths)
        if number < max(2, len(pieces)):
            continue
        bids = {name: states[leader[name]].ratios[: widths[name]] for name in leader}
        ranks = spread_ranks(bids, run.lora.r * len(leader))
        needed = {g: max(ranks[name] for name in leader if leader[name] == g) for g in states}
        moving = [
            g for g, state in states.items() if not has_converged(before[g], state.directions, needed[g], config.tau)
        ]
        # All processes end together, because rounding may differ between them, and on a divided base they make each
        # pass together.
        if not run.any_rank(bool(moving)):
            _say_ranks(ranks, number, run)
            return ranks
    unsettled = [name for name in moving if not isinstance(run.targets[name], ExpertLinear)]
    if not unsettled:  # only experts are left, whose directions may change for long because few tokens reach them
        leader = _without(moving, leader, states)
        return spread_ranks({n: states[leader[n]].ratios[: widths[n]] for n in leader}, run.lora.r * len(leader))
    raise InitFailed(
        f"EVA's directions still change after {limit} batches in {list_first(unsettled)}: more rows, larger"
        f" micro-batches or a lower tau than {config.tau:g} help.",
        param="lora.init.tau",
    )


def _states(config: EVA, run: Run, leader: dict[str, str], widths: dict[str, int]) -> dict[str, PCA]:
    seed = config.seed_for(run.spec.seed)
    return {
        g: PCA(max(widths[n] for n in leader if leader[n] == g), generator=make_generator(seed, g))
        for g in dict.fromkeys(leader.values())
    }


def _eva_evidence(state: PCA, rank: int, *, rows: int) -> Evidence:
    V, S = state.directions[:rank].cpu(), state.S[:rank].cpu()
    facts = {"explained_variance": float(state.ratios[:rank].sum())}
    return Evidence(directions=V, spread=S, rank=rank, rows=rows, facts=facts)


def _starved_experts(states: dict[str, PCA], widths: dict[str, int], run: Run) -> list[str]:
    """Experts whose tokens are too few, or too similar, for as many directions as they may get."""
    return [
        name
        for name, state in states.items()
        if isinstance(run.targets[name], ExpertLinear)
        and (state.tokens <= widths[name] or alive_directions(state.S) < widths[name])
    ]


def _without(experts: Sequence[str], leader: dict[str, str], states: dict[str, PCA]) -> dict[str, str]:
    """`leader` without these experts. They are removed from `states` too."""
    for name in experts:
        del states[name]
    return {name: g for name, g in leader.items() if name not in experts}


def _refuse_starved(states: dict[str, PCA], widths: dict[str, int]) -> None:
    starved = [name for name, state in states.items() if state.tokens <= widths[name]]
    if starved:
        fewest = min(states[name].tokens for name in starved)
        raise UnsupportedInit(
            f"EVA needs more tokens than directions, and {list_first(starved)} got {fewest}: more or longer calibration"
            " rows, or a smaller r.",
            param="lora.init.samples",
        )


def _say_ranks(ranks: dict[str, int], seen: int, run: Run) -> None:
    empty = [name for name, rank in ranks.items() if rank == 0]
    text = f"EVA: directions have converged after {seen} batches; ranks {min(ranks.values())} to {max(ranks.values())}"
    text += f"; {len(empty)} modules get no adapter" if empty else ""
    data = {"kind": "init", "batches": seen, "without_adapter": empty}
    run.emit(Message(message=text, data=data))
