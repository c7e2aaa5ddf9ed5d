"""Which layers of a base model can carry a LoRA, and which of them a run asks for."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorainit.config.errors import UnknownTarget
from lorainit.config.model_facts import Group, LeftOut, Target
from lorainit.config.paths import collapse_names, matches
from lorainit.config.spec import Lora
from lorainit.config.target_modules import FIELD, resolve_target_modules
from lorainit.model.layers.experts import ExpertLinear, ExpertStack, full_name
from lorainit.model.layers.weight import shape_of
from lorainit.model.targets.groups import group_of
from lorainit.model.targets.moe import OWN_WAY
from lorainit.model.targets.names import short_names
from lorainit.model.targets.peft_support import find_refusals, find_rewritten

TOWER = "it belongs to a vision or audio tower, which text does not pass through"
ROUTER = "it is a router or gate: which experts run would jump with it"
NUMBERED = "it has a number in a sequence and no name of its own, by which readers of adapters could find it"
_TOWERS = ("vision", "visual", "image", "audio", "speech", "multi_modal", "multimodal")
_GATES = ("gate", "shared_expert_gate", "classifier", "wg")


@dataclass(frozen=True)
class Layer:
    """A linear layer, or one expert's matrix.

    `name`: as in `Target`; `path`: its full name, for an expert the name of the common parameter; `refusal`: why it
    cannot carry a LoRA ("" = it can).
    """

    name: str
    path: str
    group: Group
    module: nn.Module
    refusal: str
    dora: bool


def find_linear_layers(model: Any) -> dict[str, nn.Module]:
    """All linear layers by name, in the model's order, without the output embedding.

    In a mixture each expert's matrix is one layer (`…experts.down_proj.3`), if `experts.install` was called before.
    """
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | ExpertLinear) and module is not head and not name.endswith("lm_head")
    }


# --- what there is -----------------------------------------------------------------------------------


def survey(model: nn.Module) -> dict[str, Layer]:
    """Every linear layer by its full name, with or without weights (a skeleton on the meta device will do)."""
    found = find_linear_layers(model)
    paths = {name: full_name(name, module) for name, module in found.items()}
    plain = {name: module for name, module in found.items() if not isinstance(module, ExpertLinear)}
    refusals = {name: _refusal(model, name, module) for name, module in plain.items()} | _registered_twice(model, plain)
    if isinstance(model, PreTrainedModel):  # a copy for the trial can be built only from transformers' configuration
        refusals |= find_refusals(model, [name for name in plain if not refusals[name]])
    parameters = {name for name in found if name not in plain} | set(find_rewritten(model, list(plain)))
    groups = {name: group_of(model, name) for name in found}
    kinds = {path: (groups[name], refusals.get(name), name in parameters) for name, path in paths.items()}
    others = {name for name, _ in model.named_modules() if name} - set(found) - set(kinds)
    names = short_names(kinds, others)
    # Experts always get the last two parts of their parameter's name, so that it looks alike in every model:
    # `experts.gate_up_proj`.
    names |= {paths[name]: ".".join(paths[name].split(".")[-2:]) for name in found if name not in plain}
    return {
        name: Layer(names[path], path, groups[name], found[name], refusals.get(name, ""), name not in parameters)
        for name, path in paths.items()
    }


def _refusal(model: Any, name: str, module: nn.Module) -> str:
    path = name.lower().split(".")
    if any(word in part for part in path for word in _TOWERS):
        return TOWER
    if path[-1].isdigit():
        return NUMBERED
    outputs, _ = shape_of(module)
    gate = path[-1] in _GATES and (outputs == 1 or outputs in _expert_counts(model))
    return ROUTER if gate or "router" in f"{name}.{type(module).__name__}".lower() else ""


def _expert_counts(model: Any) -> set[int]:
    if not hasattr(model, "config"):
        return set()
    config = model.config.get_text_config().to_dict()
    return {value for key, value in config.items() if "expert" in key and isinstance(value, int)}


def _registered_twice(model: nn.Module, found: Mapping[str, nn.Module]) -> dict[str, str]:
    """Refuse layers that are registered in two modules, because PEFT replaces only the first one by name."""
    places = dict[int, set[tuple[int, str]]]()
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), set()).add((id(parent), name))
    return {
        name: f"it is registered at {len(places[id(module)])} places, of which PEFT adapts the first only"
        for name, module in found.items()
        if len(places[id(module)]) > 1
    }


def describe(model: nn.Module) -> tuple[list[Target], list[LeftOut]]:
    """The kinds of layers that can carry a LoRA, and the kinds that cannot, in order of first appearance."""
    return _kinds(model, survey(model))


def _kinds(model: nn.Module, layers: Mapping[str, Layer]) -> tuple[list[Target], list[LeftOut]]:
    targets, left_out = kinds_of((layer.name, layer) for layer in layers.values())
    return targets, [*left_out, *_stacked_experts(model)]


def kinds_of(named: Iterable[tuple[str, Layer]]) -> tuple[list[Target], list[LeftOut]]:
    """Group layers, given with the names to use, into facts: kinds that can carry a LoRA, and kinds that cannot."""
    kinds = dict[tuple[str, Group, int, int, bool, bool, str], list[str]]()
    for name, layer in named:
        expert = isinstance(layer.module, ExpertLinear)
        kind = name, layer.group, *shape_of(layer.module), layer.dora, expert, layer.refusal
        kinds.setdefault(kind, []).append(layer.path)
    targets, left_out = list[Target](), list[LeftOut]()
    for (name, group, out, n, dora, expert, why), paths in kinds.items():
        facts: dict[str, Any] = {"name": name, "group": group, "out_features": out, "in_features": n}
        facts |= {"count": len(paths), "dora": dora, "experts": expert, "paths": collapse_names(dict.fromkeys(paths))}
        if why:
            left_out.append(LeftOut(**facts, reason=why))
        else:
            targets.append(Target(**facts))
    return targets, left_out


def _stacked_experts(model: nn.Module) -> list[LeftOut]:
    """Experts without linear layers of their own; the sides are in the order in which the base stores them."""
    kinds: Counter[tuple[str, int, int]] = Counter()
    places = dict[tuple[str, int, int], list[str]]()
    for name, parameter in model.named_parameters():
        path = name.removesuffix(".weight").split(".")
        holder = model.get_submodule(name.rpartition(".")[0])
        expert = "expert" in f"{name}.{type(holder).__name__}".lower()
        if expert and parameter.ndim == 3 and not isinstance(holder, ExpertStack | nn.Conv1d):
            experts, out, n = parameter.shape
            kinds[kind := (".".join(path[-2:]), out, n)] += experts
            places.setdefault(kind, []).append(".".join(path))
    common: dict[str, Any] = {"group": "mlp", "experts": True, "reason": OWN_WAY}
    return [
        LeftOut(
            name=name,
            out_features=out,
            in_features=n,
            count=count,
            paths=collapse_names(places[name, out, n]),
            **common,
        )
        for (name, out, n), count in kinds.items()
    ]


# --- what a run asks for --------------------------------------------------------------------------------


def find_targets(model: nn.Module, wanted: str | list[str]) -> dict[str, nn.Module]:
    """The layers by full name that `wanted` (as `Lora.target_modules`) covers, independent of the rank."""
    return resolve(model, Lora(r=1, target_modules=wanted))[0]  # type: ignore[arg-type]


def resolve(model: nn.Module, lora: Lora) -> tuple[dict[str, nn.Module], list[LeftOut]]:
    """The layers a run adapts, by full name, and the kinds that it leaves out.

    Args:
        lora: `target_modules` is `all-linear`, `attention`, `mlp`, or ends of module names (`q_proj`, `mlp.c_proj`,
            `layers.*.self_attn.q_proj`).

    Raises:
        UnknownTarget: a name matches no module at all, or nothing that can carry a LoRA.
        UnsupportedInit: a layer that was named can carry a LoRA but no DoRA, or no LoftQ.
        RankTooLarge: a layer that was named is smaller than the rank.
    """
    layers = survey(model)
    wanted = lora.target_modules
    if not isinstance(wanted, str):
        found = {end for end in wanted if any(matches(layer.path, end) for layer in layers.values())}
        _require_linear(model, wanted, found, layers)
    resolved = resolve_target_modules(lora, *_kinds(model, layers))
    names = set(resolved.names)
    chosen = {
        full: layer.module
        for full, layer in layers.items()
        if not layer.refusal and (layer.name in names or any(matches(layer.path, name) for name in names))
    }
    return chosen, resolved.left_out


def _require_linear(model: nn.Module, wanted: Sequence[str], found: set[str], layers: Mapping[str, Layer]) -> None:
    for index, end in enumerate(wanted):
        if end in found:
            continue
        param = f"{FIELD}[{index}]"
        for name, module in model.named_modules():
            if name and matches(name, end):
                kind = type(module).__name__
                why = f": {ROUTER}" if "router" in kind.lower() else ""
                raise UnknownTarget(
                    f"{param}: {name} is of type {kind}{why}; only linear layers other than the output head qualify.",
                    param=param,
                )
        known = ", ".join(dict.fromkeys(layer.name for layer in layers.values() if not layer.refusal))
        raise UnknownTarget(f"{param}: {end!r} matches nothing in this base model, which has {known}.", param=param)
