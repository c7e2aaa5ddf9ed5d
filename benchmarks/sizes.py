"""docs/sizes.md: what a job holds in a GPU's memory, and how much it computes, for bases of known shapes.

    python benchmarks/sizes.py [--write docs/sizes.md]

Sums over shapes: no weight is made and nothing is measured. What a forward pass takes beside it is not in these sums,
because a run measures that before its first step (`lorainit.train.memory`).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu.day import SHAPES
from benchmarks.train_page import write_section
from lorainit.model import memory
from lorainit.model.layers.decoder_layers import listed_layers
from lorainit.train.memory import SHARE

NAME = "sizes"  # the place in docs/sizes.md
RANK, TOKENS = 16, 2048
GPUS = (16, 24, 48, 80)  # GiB
GIB = 2**30
# Bytes of a number that is trained: itself, its gradient and AdamW's two moments, all in float32.
TRAINED = 16
# Bytes of a weight in NF4 as we load it: half a byte, and a float32 for every 64 of them.
NF4 = 0.5 + 4 / 64
# Forward, and backward through a base that is not trained: two operations a weight and token each.
OPERATIONS = 4
REACHED = 100e12  # operations a second, an example
SHAPES_OF_PAGE: dict[str, dict[str, Any]] = {
    **{name: shape for name, shape in SHAPES.items() if name != "tiny"},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


def base_of(shape: dict[str, Any]) -> LlamaForCausalLM:
    """A Llama in bf16 without any memory for its weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16)


def linear_layers(model: LlamaForCausalLM) -> list[torch.nn.Linear]:
    """Those that carry a LoRA by default: all of the decoder layers."""
    modules = (module for layer in listed_layers(model) for module in layer.modules())
    return [module for module in modules if isinstance(module, torch.nn.Linear)]


def sums(shape: dict[str, Any]) -> dict[str, float]:
    """Bytes by what they are for, and operations of a million tokens."""
    model = base_of(shape)
    linear = linear_layers(model)
    in_linear = sum(module.weight.numel() for module in linear)
    factors = RANK * sum(sum(module.weight.shape) for module in linear)
    weights = memory.weight_bytes(model)
    return {
        "weights": weights,
        "nf4": weights - in_linear * 2 + in_linear * NF4,
        "trained": TRAINED * factors,
        "copy": memory.copy_bytes(model, tokens=TOKENS, factors=factors),
        "operations": OPERATIONS * (in_linear + model.lm_head.weight.numel()) * 1e6,
    }


def table() -> str:
    """The page's tables."""
    found = {name: sums(shape) for name, shape in SHAPES_OF_PAGE.items()}
    lines = [
        "| shape | weights in bf16 | weights in NF4 | adapter, gradients, optimizer | second base, for the check |",
        "|---|---|---|---|---|",
    ]
    for name, of in found.items():
        held = " | ".join(f"{of[kind] / GIB:.1f}" for kind in ("weights", "nf4", "trained", "copy"))
        lines.append(f"| {name} | {held} |")
    lines += ["", f"GiB, at r = {RANK}. What {SHARE:.0%} of a GPU leaves for the passes of a step, bf16 and NF4:", ""]
    lines += ["| shape | " + " | ".join(f"{size} GiB" for size in GPUS) + " |", "|---" * (len(GPUS) + 1) + "|"]
    for name, of in found.items():
        cells = (f"{left(of, 'weights', size)}, {left(of, 'nf4', size)}" for size in GPUS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| shape | operations for a million tokens | minutes at 100 TFLOP/s |", "|---|---|---|"]
    for name, of in found.items():
        lines.append(f"| {name} | {of['operations']:.1e} | {of['operations'] / REACHED / 60:.1f} |")
    return "\n".join(lines)


def left(of: dict[str, float], weights: str, size: int) -> str:
    """GiB for passes on a GPU of this size; "no" where base and adapter do not fit."""
    free = SHARE * size - (of[weights] + of["trained"]) / GIB
    return f"{free:.0f}" if free >= 1 else "no"


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page whose tables are replaced")
    page = parser.parse_args().write
    if page is None:
        print(table())
    else:
        write_section(page, NAME, table())


if __name__ == "__main__":
    main()
