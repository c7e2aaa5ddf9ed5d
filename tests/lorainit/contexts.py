"""A run on a tiny model, and what must be untouched after it worked."""

import hashlib
import sys
from collections import Counter
from types import SimpleNamespace

import torch

from lorainit.config.spec import Hyperparameters, Lora
from lorainit.context import Run, RunRequest
from lorainit.data.batches import any_length, collate
from lorainit.data.dataset import Dataset
from lorainit.data.reader import load
from lorainit.model.base import open_base
from lorainit.model.layers import experts
from lorainit.model.load import load_model
from lorainit.model.targets.targets import find_targets
from lorainit.prepare import prepare
from lorainit.runtime.distributed.world import World
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
    return run_of(
        model,
        find_targets(model, wanted),
        data,
        Lora.model_validate({"init": init, "r": r}).resolve()[0],
        training=Hyperparameters(**recipe),
        size=size,
        total=total,
        seed=3,
        pad=pad,
        emit=on_event,
    )


def prepared(spec, out, emit=lambda event: None):
    """The run of a spec, before its adapter is initialized."""
    return prepare(RunRequest(spec, out, emit), open_base(spec, out, lambda event: None))


def run_of(
    model, targets, data, lora, *, training, size, total=4, seed=0, pad=0, emit=None, folder=None, out=None, layers=None
):
    """A run on a model that no `Base` has loaded, as far as collectors and trainers look at it."""
    place = SimpleNamespace(folder=folder)
    base = SimpleNamespace(
        model=model, device=CPU, world=World(), pad=pad, regime=any_length, location=place, sharded="", packs=False,
        sha256="", make_batch=lambda samples: collate(samples, pad=pad),
    )  # fmt: skip
    return Run(
        spec=SimpleNamespace(seed=seed, stop_after=None, data=SimpleNamespace(append_eos=False)),
        out=out,
        emit=emit or (lambda event: None),
        base=base,
        lora=lora,
        training=training,
        data=data,
        targets=targets,
        passes=SimpleNamespace(rows=size, tokens=sys.maxsize, kept=False, recomputed=False),
        plan=SimpleNamespace(total_steps=total),
        layers=layers or {},
    )


def dataset_of(samples):
    """A dataset of these rows and nothing else."""
    return Dataset(list(samples), "", len(samples), 0, [], Counter(), [])


def state(model):
    """Everything a collector could leave behind: bits, module classes, hooks, modes, gradients."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    modules = [
        (name, id(m), m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()
    ]
    return digest.hexdigest(), modules, [(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()]
