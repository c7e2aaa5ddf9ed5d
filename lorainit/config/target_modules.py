"""Resolves `lora.target_modules`: which kinds of layers a run adapts, decided from facts of the base alone.

The API and the library call the same function, so they always agree.

Loads no torch and sees no modules: `lorainit.model.targets.targets` collects the facts and finds the named layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from lorainit.config.errors import LorainitError, RankTooLarge, UnknownTarget, UnsupportedInit
from lorainit.config.inits import Automatic
from lorainit.config.model_facts import LeftOut, Target
from lorainit.config.paths import collapse_names, expand_names, matches
from lorainit.config.spec import Lora

FIELD = "lora.target_modules"


@dataclass(frozen=True)
class ResolvedTargets:
    """Which layers get an adapter, and which were asked for but get none, each with the reason.

    `names`: kinds of layers (`Target.name`). A name that covers only some layers of a kind stands here as it was given.
    """

    names: list[str]
    left_out: list[LeftOut]


def resolve_target_modules(lora: Lora, targets: Sequence[Target], left_out: Sequence[LeftOut]) -> ResolvedTargets:
    """Resolve `lora.target_modules`.

    A group (`all-linear`, `attention`, `mlp`) adapts every layer that it can and reports the others: layers that
    cannot carry a LoRA, and layers smaller than the rank. A single name is adapted or refused, because the caller
    asked for exactly that layer. If a name also covers layers that cannot carry a LoRA (the `q_proj` of a vision
    tower), these are reported and the others adapted. A name is the end of a layer's full name, with `*` for a number.

    Args:
        lora: its rank and initialization count too, because a layer may be too small for them.
        targets, left_out: the facts of the base.

    Raises:
        UnknownTarget: nothing of the group, or nothing of that name, can carry a LoRA.
        RankTooLarge: a layer that was named is smaller than the rank, or all of a group are.
        UnsupportedInit: a layer that was named, or all of a group, can carry a LoRA but no DoRA, or no LoftQ.
    """
    wanted = lora.target_modules
    if isinstance(wanted, str):
        return _resolve_group(lora, wanted, targets, left_out)
    names = dict[str, None]()
    also = list[LeftOut]()
    for index, name in enumerate(wanted):
        meant = [(target, count) for target in targets if (count := target.count_matches(name))]
        others = [_select_part(layer, name, count) for layer in left_out if (count := layer.count_matches(name))]
        if not meant:
            raise _refuse_name(name, f"{FIELD}[{index}]", others, targets)
        for target, _ in meant:
            if obstacle := _find_obstacle(lora, target):
                raise obstacle[0]
        partly = {target.name for target in targets if target.count_matches(name) < target.count}
        names |= dict.fromkeys(name if target.name in partly else target.name for target, _ in meant)
        also += others
    # A server stores a group as a list of names, with the layers that it left out when it resolved the group. These
    # entries are kept. They are compared without full names, because older catalogue entries have none.
    listed = [_without_paths(layer) for layer in also]
    kept = [layer for layer in lora.left_out if _without_paths(layer) not in listed]
    return ResolvedTargets(list(names), also + kept)


def count_chosen(target: Target, names: Sequence[str]) -> int:
    """How many layers of this kind the names cover together."""
    if target.name in names:
        return target.count
    found, held = _count_found(tuple(target.paths), tuple(names))
    return target.count * found // held if held else 0


@lru_cache(maxsize=1024)
def _count_found(paths: tuple[str, ...], names: tuple[str, ...]) -> tuple[int, int]:
    """How many of these layers the names cover, and how many there are.

    Cached, because the service computes it each time it shows a job.
    """
    held = [path for one in paths for path in expand_names(one)]
    return sum(any(matches(path, name) for name in names) for path in held), len(held)


def _select_part(layer: LeftOut, name: str, count: int) -> LeftOut:
    """This kind, reduced to the `count` layers that the name covers."""
    if count == layer.count:
        return layer
    held = [path for one in layer.paths for path in expand_names(one)]
    paths = collapse_names(path for path in held if matches(path, name))
    return layer.model_copy(update={"paths": paths, "count": count})


def _without_paths(layer: LeftOut) -> LeftOut:
    return layer.model_copy(update={"paths": []})


def _resolve_group(lora: Lora, wanted: str, targets: Sequence[Target], left_out: Sequence[LeftOut]) -> ResolvedTargets:
    meant = [target for target in targets if wanted in ("all-linear", target.group)]
    others = [layer for layer in left_out if wanted in ("all-linear", layer.group)]
    obstacles = {target.name: found for target in meant if (found := _find_obstacle(lora, target))}
    names = list(dict.fromkeys(target.name for target in meant if target.name not in obstacles))
    if not names and obstacles:
        raise next(iter(obstacles.values()))[0]
    if not names:
        raise UnknownTarget(
            f"{FIELD} {wanted!r} matches nothing that can carry a LoRA in this base model.{_list_reasons(others)}",
            param=FIELD,
        )
    small = [LeftOut(**t.model_dump(), reason=obstacles[t.name][1]) for t in meant if t.name in obstacles]
    return ResolvedTargets(names, [*others, *small])


def _find_obstacle(lora: Lora, target: Target) -> tuple[LorainitError, str] | None:
    """Why this adapter does not fit a layer that could carry one; None if it fits.

    Returns both forms of the answer: the error to raise if the layer was named, and the reason to report if it belongs
    to a group.
    """
    shape = f"{target.name!r} ({target.out_features}x{target.in_features})"
    if lora.use_dora and (target.experts or not target.dora):
        why = (
            "PEFT has no DoRA for experts" if target.experts else "PEFT adapts it as a parameter, and has no DoRA there"
        )
        return UnsupportedInit(f"lora.use_dora does not fit {shape}: {why}.", param="lora.use_dora"), why
    if target.experts and not isinstance(lora.init, Automatic) and (why := lora.init.refuses_experts):
        return UnsupportedInit(f"lora.init {lora.init.method!r} does not fit {shape}: {why}.", param="lora.init"), why
    if lora.r > target.smaller_side:
        message = f"lora.r {lora.r} is larger than the smaller side ({target.smaller_side}) of {shape}."
        why = f"a matrix of that name is smaller than the rank, {lora.r}"
        return RankTooLarge(message, param="lora.r"), why
    needed = 0 if isinstance(lora.init, Automatic) else lora.init.smaller_side(lora.r)
    if needed > target.smaller_side:
        message = f"lora.init at rank {lora.r} needs {needed} directions, more than the smaller side"
        why = f"a matrix of that name is smaller than the {needed} directions that the initialization needs"
        return RankTooLarge(f"{message} ({target.smaller_side}) of {shape}.", param="lora.init"), why
    return None


def _refuse_name(name: str, param: str, others: Sequence[LeftOut], targets: Sequence[Target]) -> UnknownTarget:
    if others:
        return UnknownTarget(f"{param} {name!r} cannot carry a LoRA.{_list_reasons(others)}", param=param)
    known = ", ".join(dict.fromkeys(target.name for target in targets))
    if all(target.paths for target in targets):
        why = "no linear layer of this base model has a name that ends like this"
    else:
        why = "the base's catalogue entry has no such name, and an older version wrote it without full names"
    return UnknownTarget(f"{param} {name!r}: {why}. Available: {known}.", param=param)


def _list_reasons(others: Sequence[LeftOut]) -> str:
    reasons = dict.fromkeys(f"{layer.name}: {layer.reason}" for layer in others)
    return f" Left out: {'; '.join(reasons)}." if reasons else ""


def describe_left_out(left_out: Sequence[LeftOut], adapted: int) -> str:
    """One sentence on the layers that get no adapter, for the job's events.

    Args:
        adapted: how many weights the adapted matrices hold.
    """
    by_reason = dict[str, list[str]]()
    for layer in left_out:
        by_reason.setdefault(layer.reason, []).append(f"{layer.name} ({layer.count})")
    reasons = "; ".join(f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in by_reason.items())
    missed = sum(layer.weights for layer in left_out)
    share = 100 * missed / max(1, missed + adapted)
    percent = f"{share:.0f}" if share >= 9.5 else f"{share:.2g}" if share >= 0.01 else "less than 0.01"
    return f"Without a LoRA, {percent} % of the matrix weights asked for: {reasons}."
