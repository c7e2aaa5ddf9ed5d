"""Messages about a mixture of experts: what the run adapts, what it leaves out and why, and what that costs in memory.

They are emitted before the first step, so that a user can stop a run that adapts too little or too much.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lorainit.config.events import Message
from lorainit.config.spec import Lora
from lorainit.model.layers.experts import ExpertLinear, find_stacks
from lorainit.model.layers.weight import shape_of

FLOAT = 4  # bytes of what is trained
OWN_WAY = "their architecture runs them in a way of its own, which is not adapted"


def describe(model: nn.Module, targets: Mapping[str, nn.Module], lora: Lora) -> list[Message]:
    """The messages about a mixture; none for other models. Must be called before adapters are attached."""
    outside, held = find_left_out(model), _expert_weights(model)
    if not outside and not held:
        return []
    whole = sum(count_weights(model).values())
    adapted = sum(out * n for out, n in map(shape_of, targets.values()))
    experts = [module for module in targets.values() if isinstance(module, ExpertLinear)]
    facts: dict[str, Any] = {
        "kind": "data",
        "expert_matrices": len(experts),
        "adapted_share": round(adapted / whole, 4),
        "expert_share": round((held + sum(outside.values())) / whole, 4),
    }
    messages = [_cost(targets, experts, lora, facts)]
    # Layers that a group leaves out are reported by `target_modules.describe_left_out` already.
    is_reported = any(layer.experts for layer in lora.left_out)
    if not is_reported and (outside or not experts):
        why = OWN_WAY if outside else "target_modules leaves them out"
        missing = facts["expert_share"] - sum(m.out_features * m.in_features for m in experts) / whole
        text = f"Experts that hold {_percent(missing)} of the base's matrix weights get no adapter: {why}."
        messages.append(Message(level="warn", message=text, data={**facts, "left_out": sorted(outside)[:20]}))
    if lora.quantization and held:
        text = (
            f"Experts hold {_percent(held / whole)} of the base's matrix weights and stay in the run's precision:"
            " NF4 is for linear layers, and transformers keeps experts in parameters of three dimensions."
        )
        messages.append(Message(level="warn", message=text, data=facts))
    return messages


def _cost(targets: Mapping[str, nn.Module], experts: list[ExpertLinear], lora: Lora, facts: dict[str, Any]) -> Message:
    """How much is adapted, and how much memory that takes: factors, gradients and the optimizer's two moments."""
    trained = sum(lora.count_parameters(*shape_of(module)) for module in targets.values())
    copies = 5 if lora.method.offset == "subtract" else 4  # the subtracted start is kept too
    facts |= {"trainable_parameters": trained, "adapter_bytes": copies * FLOAT * trained}
    text = (
        f"A mixture of experts: {len(targets)} adapters, {len(experts)} of them on matrices of experts, cover"
        f" {_percent(facts['adapted_share'])} of the base's matrix weights (embeddings and output head aside)."
        f" {trained:,} numbers are trained, which take {facts['adapter_bytes'] / 2**20:,.1f} MiB with gradients and"
        " optimizer."
    )
    return Message(message=text, data=dict(facts))


def _percent(share: float) -> str:
    """Rounded down, so that 100 % is shown only if nothing is missing, not even a router."""
    return f"{int(100 * share + 1e-9)} %"


# --- counting --------------------------------------------------------------------------------------


def count_weights(model: Any) -> dict[str, int]:
    """How many numbers each weight of two or more dimensions has, without embeddings and output head."""
    aside = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    head = model.get_output_embeddings()
    aside |= {id(p) for p in head.parameters()} if head is not None else set()
    return {name: n for name, p, n in _weights(model) if id(p) not in aside}


def find_left_out(model: nn.Module) -> dict[str, int]:
    """Experts' parameters without layers of ours, by name, with how many numbers they have."""
    ours = {id(stack.weight) for stack in find_stacks(model).values()}
    return {name: n for name, p, n in _weights(model) if id(p) not in ours and _is_of_experts(model, name)}


def _expert_weights(model: nn.Module) -> int:
    return sum(_elements(stack.weight) for stack in find_stacks(model).values())


def _weights(model: nn.Module) -> Iterable[tuple[str, nn.Parameter, int]]:
    for name, p in model.named_parameters():
        # Weights in four bits are included, because they have two dimensions too: a column of bytes, or rows.
        if p.ndim >= 2 and not name.endswith("bias"):
            yield name, p, _elements(p)


def _is_of_experts(model: nn.Module, parameter: str) -> bool:
    """Whether the parameter's name or its module's class names experts (JetMoE has a class `JetMoeParallelExperts`)."""
    holder = model.get_submodule(parameter.rpartition(".")[0])
    return "expert" in f"{parameter}.{type(holder).__name__}".lower() and not isinstance(holder, nn.Linear)


def _elements(parameter: Any) -> int:
    """How many numbers a parameter represents; for four bits that is more than it has bytes."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else torch.Size(state.shape).numel())
