"""The tiny model whose LoRA-One numbers are known, its eight rows, and a collector's context."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorainit.config.spec import Hyperparameters, Lora
from lorainit.context import Run
from lorainit.data.batches import Budget
from lorainit.data.dataset import Sample
from lorainit.init.collectors.line_search import compute_calibration_loss
from lorainit.init.methods import METHODS
from lorainit.model.layers.layer import LoRALinear, attach
from lorainit.model.layers.weight import weight_of
from lorainit.model.targets.targets import find_targets
from lorainit.runtime.devices import make_generator
from tests.lorainit.contexts import dataset_of, run_of

CPU = torch.device("cpu")


def tiny() -> LlamaForCausalLM:
    """Two layers, 14 linear maps, base loss 4.6439 on `eight_rows`."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=64,
        initializer_range=0.05,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def eight_rows() -> list[Sample]:
    """Eight rows of 32 random tokens, all trained."""
    ids = torch.randint(0, 97, (8, 32), generator=torch.Generator().manual_seed(1234))
    return [Sample(line, row.int(), torch.ones(32, dtype=torch.bool)) for line, row in enumerate(ids)]


def context(
    model, samples, init, *, r=8, size=1, on_event=lambda event: None, wanted="all-linear", folder=None, **lora
) -> Run:
    """What `collect` works with, for an init written as in a request."""
    return run_of(
        model,
        find_targets(model, wanted),
        dataset_of(samples),
        Lora.model_validate({"init": init, "r": r, **lora}).resolve()[0],
        training=Hyperparameters(),
        size=size,
        total=1,
        emit=on_event,
        folder=folder,
    )


def factors_of(found: Run, evidence) -> dict:
    """Each target's factors as `initialize` would get them."""
    return {
        name: METHODS[found.lora.method.method](
            weight_of(module).detach(),
            evidence[name],
            rank=found.lora.r,
            scale=found.lora.scaling,
            config=found.lora.method,
            generator=make_generator(0, name),
        )
        for name, module in found.targets.items()
    }


def loss_with(found: Run, factors, *, sign=1.0) -> float:
    """The loss on the context's rows with s·B·A (times `sign`) added to every target."""
    subtract = found.lora.method.offset == "subtract"
    try:
        for name, module in found.targets.items():
            scale = sign * found.lora.scaling
            attach(found.model, name, LoRALinear(module, factors[name], scale=scale, subtract=subtract))
        return loss_of(found)
    finally:
        for name, module in found.targets.items():
            attach(found.model, name, module)


def loss_of(found: Run) -> float:
    """The loss of the model as it is."""
    return compute_calibration_loss(found.model, found.samples, pad=0, device=CPU, budget=Budget(8))
