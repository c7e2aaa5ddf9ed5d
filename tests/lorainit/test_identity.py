"""One step of ours is one step of stock PEFT, for every method: same rows, same loss, same clipping, same factors."""

import math
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorainit.config.inits import INITS
from lorainit.data.batches import collate, order_rows, split_into_batches
from lorainit.init.stage import start
from lorainit.model.layers.weight import weight_of
from lorainit.model.load import load_model
from lorainit.train.adapter_trainer import AdapterTrainer
from lorainit.train.loop import train
from tests.lorainit.contexts import prepared
from tests.lorainit.stock_peft import SameMask

RATE, CLIP = 1e-2, 0.5
METHODS = {name: {"method": name} for name in sorted(INITS) if name != "loftq"}  # which needs a quantized base
# To a step these are as kaiming or as pissa, which is subtracted.
ALIKE = {"gaussian", "orthogonal", "hrp", "milora", "olora", "corda"}


def initialized(spec, tmp_path, **overrides):
    training = {"max_steps": 1, "batch_size": 5, "learning_rate": RATE, "max_grad_norm": CLIP, "warmup_ratio": 0.0}
    made = spec(**{**overrides, "training": training | overrides.get("training", {})})
    job = prepared(made, tmp_path)
    start(job)
    return job


def write_nothing(run, folder):
    folder.mkdir()


def stock(job, base):
    """PEFT's model with the same start: the offset taken off the base's weights, as PEFT does it."""
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    layers = {name: layer for name, layer in job.layers.items() if len(layer.A)}
    config = LoraConfig(
        r=1, rank_pattern={name: len(layer.A) for name, layer in layers.items()},
        alpha_pattern={name: layer.scale * len(layer.A) for name, layer in layers.items()},
        target_modules=list(layers), lora_dropout=job.lora.dropout,
        fan_in_fan_out=base.name.endswith("gpt2"),
    )  # fmt: skip
    with warnings.catch_warnings():  # PEFT asks transformers by an old name
        warnings.simplefilter("ignore")
        found = get_peft_model(model, config)
    factors = {}
    for name, layer in layers.items():
        theirs = found.get_submodule(f"base_model.model.{name}")
        A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
        with torch.no_grad():
            A.copy_(layer.A)
            B.copy_(layer.B)
            if layer.A0 is not None:
                weight_of(theirs.base_layer).sub_(layer.scale * layer.B0.double() @ layer.A0.double())
        theirs.lora_dropout["default"] = SameMask(layer)
        factors[name] = A, B
    return found.eval(), factors


def stock_step(job, model, factors, draw):
    """The loop anybody would write: full logits, mean over the batch's trained tokens, clip, AdamW."""
    samples = [job.data.samples[i] for i in order_rows(job.data, seed=0, epoch=0)[: job.training.batch_size]]
    trained = sum(int(s.trained[1:].sum()) for s in samples)
    for number, piece in enumerate(split_into_batches(samples, job.budget)):
        draw(number)
        batch = collate(piece, pad=0)
        logits = model(input_ids=batch.ids, attention_mask=batch.attention).logits[:, :-1]
        wanted = batch.trained[:, 1:]
        loss = nn.functional.cross_entropy(logits[wanted], batch.ids[:, 1:][wanted], reduction="sum")
        (loss / trained).backward()
    draw(None)
    parameters = [p for pair in factors.values() for p in pair]
    norm = torch.nn.utils.clip_grad_norm_(parameters, job.training.max_grad_norm or math.inf)
    torch.optim.AdamW(parameters, lr=RATE, weight_decay=job.training.weight_decay).step()
    return norm


def distance(ours, theirs):
    """Relative, over the factors of all layers."""
    ours, theirs = (torch.cat([t.detach().flatten() for t in one]) for one in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm())


def in_turn(job, factors):
    """Our factors and PEFT's, layer by layer."""
    ours = [factor for name in factors for factor in (job.layers[name].A, job.layers[name].B)]
    return ours, [factor for pair in factors.values() for factor in pair]


def one_step(job, base, tmp_path):
    model, factors = stock(job, base)
    ours, theirs = in_turn(job, factors)
    before = [p.detach().clone() for p in theirs]
    drawn = AdapterTrainer(job, write_adapter=write_nothing)
    drawn.step = 1
    norm = stock_step(job, model, factors, drawn.drop_by)
    assert float(norm.detach()) > CLIP  # or clipping would not be tested
    assert distance(theirs, before) > 1e-4
    ([(_, end)],) = train([job], [None], write_adapter=write_nothing)
    assert end.step == 1
    # Adam gives an entry whose gradient is nothing but rounding a step of full size, of either sign.
    meant = [t.grad.abs() > 1e-4 * t.grad.abs().max() for t in theirs]
    assert sum(int(m.sum()) for m in meant) > 0.45 * sum(m.numel() for m in meant)
    return distance(*([t.detach()[m] for t, m in zip(one, meant, strict=True)] for one in (ours, theirs)))


def is_slow(init, base):
    return init in ALIKE or (base == "gpt2" and init not in ("kaiming", "pissa"))


@pytest.mark.parametrize(
    ("init", "base"),
    [
        pytest.param(init, base, marks=pytest.mark.slow if is_slow(init, base) else ())
        for init in METHODS
        for base in ("llama", "gpt2")
    ],
)
def test_one_step_is_stock_pefts(spec, bases, tmp_path, base, init):
    job = initialized(spec, tmp_path, base=base, lora={"init": METHODS[init], "r": 4}, micro_batch_size=2)
    assert one_step(job, bases[base], tmp_path) < 1e-6


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("init", ["kaiming", pytest.param("orthogonal", marks=pytest.mark.slow)])
def test_one_step_with_dropout_is_stock_pefts(spec, bases, tmp_path, base, init):
    """Row by row, where both draw the same mask."""
    lora = {"init": init, "r": 4, "dropout": 0.3}
    job = initialized(spec, tmp_path, base=base, lora=lora, micro_batch_size=1, training={"weight_decay": 0.1})
    assert one_step(job, bases[base], tmp_path) < 1e-6
