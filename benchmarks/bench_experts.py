"""What adapters on experts cost: a training step beside one with adapters on the dense layers only, and beside PEFT's.

    python benchmarks/bench_experts.py [--tokens 512] [--repeats 5]

Random Mixtral-like bases of a few million weights on this machine's CPU, in fp32; forward and backward pass of one
row, the best of the repeats. Ratios carry over to other machines better than seconds do.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from lorainit.config.inits.plain import Kaiming
from lorainit.init.evidence import Evidence
from lorainit.init.methods import METHODS
from lorainit.model.layers import experts
from lorainit.model.layers.layer import LoRALinear, attach
from lorainit.model.layers.weight import weight_of
from lorainit.model.targets import moe
from lorainit.model.targets.targets import find_targets

RANK = 8
DENSE = ["q_proj", "k_proj", "v_proj", "o_proj"]
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def base(number: int, inner: int) -> MixtralForCausalLM:
    """Four layers of width 256 with `number` experts of `inner` units, two of them used."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=512, hidden_size=256, intermediate_size=inner, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=number, num_experts_per_tok=2,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval().requires_grad_(requires_grad=False)


def ours(model: Any, wanted: list[str]) -> tuple[int, float]:
    """Put adapters of ours on the wanted layers; how many numbers they train, and the share of weights they hold."""
    experts.install(model)
    targets = find_targets(model, wanted)
    share, config = moe.count_weights(model), Kaiming(method="kaiming")
    held = sum(m.in_features * m.out_features for m in targets.values())  # type: ignore[operator]
    for name, module in targets.items():
        factors = METHODS["kaiming"](
            weight_of(module), Evidence(), rank=RANK, scale=1.0, config=config, generator=torch.Generator()
        )
        attach(model, name, LoRALinear(module, factors, scale=1.0, subtract=False))
    return sum(p.numel() for p in model.parameters() if p.requires_grad), held / sum(share.values())


def pefts(model: Any) -> Any:
    """Stock PEFT's adapters on the same layers, experts among them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=DENSE, target_parameters=PARAMETERS)
        return get_peft_model(model, config)


def seconds(model: Any, tokens: int, repeats: int) -> float:
    """The fastest forward and backward pass."""
    ids = torch.randint(512, (1, tokens), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        torch.autograd.backward(model(input_ids=ids, labels=ids).loss)

    return min(timed(step) for _ in range(repeats + 1))


def timed(work: Callable[[], None]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    print("| experts × units | adapters on | share of weights | numbers trained | step | to dense only |")
    print("|---|---|---|---|---|---|")
    for number, inner in ((8, 512), (64, 64)):
        dense = 0.0
        for what, wanted in (("dense layers", DENSE), ("dense layers and experts", DENSE + PARAMETERS)):
            model = base(number, inner)
            trained, share = ours(model, wanted)
            found = seconds(model, asked.tokens, asked.repeats)
            dense = dense or found
            row = f"{share:.0%} | {trained:,} | {1000 * found:.0f} ms | {found / dense:.2f}"
            print(f"| {number} × {inner} | {what} | {row} |", flush=True)
        found = seconds(pefts(base(number, inner)), asked.tokens, asked.repeats)
        print(
            f"| {number} × {inner} | the same, stock PEFT | | | {1000 * found:.0f} ms | {found / dense:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
