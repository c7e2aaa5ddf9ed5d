"""A collector's context on a tiny model, and what must be untouched after it worked."""

import hashlib

import torch

from lorainit.config.spec import Hyperparameters, Lora
from lorainit.data.batches import Budget, order
from lorainit.data.dataset import load
from lorainit.init.evidence.context import Context
from lorainit.model.layers import experts
from lorainit.model.load import load_model
from lorainit.model.targets.targets import find_targets
from tests.lorainit.conftest import make_tokenizer

CPU = torch.device("cpu")


def make_context(
    folder, rows, init, *, r=4, size=5, wanted="all-linear", total=4, on_event=None, pad=0, install=False, **training
):
    data = load(rows, make_tokenizer(), max_length=256)
    model = load_model(folder, dtype=torch.float32, device=CPU)
    if install:
        experts.install(model)
    recipe = {"n_epochs": 1, "batch_size": 5, "learning_rate": 1e-3} | training
    return Context(
        model=model,
        targets=find_targets(model, wanted),
        samples=data.samples,
        training_samples=data.samples,
        pad=pad,
        device=CPU,
        budget=Budget(size),
        lora=Lora.model_validate({"init": init, "r": r}).resolved()[0],
        training=Hyperparameters(**recipe),
        total_steps=total,
        seed=3,
        on_event=on_event or (lambda event: None),
        order=lambda epoch: order(data, seed=3, epoch=epoch),
    )


def state(model):
    """Everything a collector could leave behind: bits, module classes, hooks, modes, gradients."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    modules = [
        (name, id(m), m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()
    ]
    return digest.hexdigest(), modules, [(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()]
