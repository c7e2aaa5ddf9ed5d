"""The same initializations by stock PEFT and by us, on the tiny model whose numbers are known."""

import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from lorainit.data.batches import collate
from lorainit.init.collectors.collect import collect
from lorainit.init.initialize import initialize
from lorainit.model.forward.loss import sum_losses
from tests.lorainit.reference import context, eight_rows, tiny

TARGETS = ["q_proj", "v_proj", "down_proj"]
Q_PROJ = "model.layers.0.self_attn.q_proj"
R, ALPHA, S = 8, 16, 2.0
INITS = {
    "pissa": {"method": "pissa", "niter": None},
    "pissa_niter_4": {"method": "pissa", "niter": 4},
    "olora": {"method": "olora"},
    "lora_ga": {"method": "lora_ga", "samples": 8},
    "corda": {"method": "corda", "samples": 8},
}


def losses(model):
    for row in eight_rows():
        part = sum_losses(model, collate([row], pad=0))
        yield part.loss / part.tokens


def gradients(model, config, *, factor=1.0):
    def step():
        for loss in losses(model):
            (factor * loss).backward()

    preprocess_loraga(model, config, step)


def moments(model, config, *, size=1, padding=0):
    """CorDA's calibration pass over the eight rows, `size` rows at a time, with padding on the right."""

    def run():
        for start in range(0, 8, size):
            rows = [collate([row], pad=0) for row in eight_rows()[start : start + size]]
            ids = torch.cat([nn.functional.pad(row.ids, (0, padding)) for row in rows])
            real = torch.cat([nn.functional.pad(row.attention, (0, padding)) for row in rows])
            model(input_ids=ids, attention_mask=real)

    preprocess_corda(model, config, run_model=run)


def pefts(init, **more):
    """A model that stock PEFT has adapted, by its name of the init; `more` goes to the pass that looks at data."""
    model = tiny()
    config = LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=init,
        lora_ga_config=LoraGAConfig() if init == "lora_ga" else None,
        corda_config=CordaConfig(corda_method="ipm") if init == "corda" else None,
    )  # fmt: skip
    if init == "lora_ga":
        gradients(model, config, **more)
    if init == "corda":
        moments(model, config, **more)
    return get_peft_model(model, config).eval()


def pefts_factors(model):
    layer = model.get_submodule(f"base_model.model.{Q_PROJ}")
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def asked(init, rows=None, size=1):
    lora = {"r": R, "alpha": float(ALPHA), "use_rslora": False}
    return context(tiny(), rows or eight_rows(), init, wanted=TARGETS, size=size, **lora)


def ours(init):
    """The same adapter by our own hands."""
    found = asked(INITS.get(init, {"method": init}))
    evidence = collect(found.lora.method, found)
    probe = collate(eight_rows()[:4], pad=0)
    initialize(
        found.model, found.targets, found.lora, seed=0, probe=probe, evidence=evidence, on_event=lambda event: None
    )
    return found.model


class SameMask(nn.Module):
    """In the place of PEFT's dropout: what ours drops."""

    def __init__(self, layer):
        super().__init__()
        self.ours = [layer.dropout]

    def forward(self, x):
        mask = self.ours[0].make_mask(x.shape, like=x)
        return x if mask is None else x * mask
