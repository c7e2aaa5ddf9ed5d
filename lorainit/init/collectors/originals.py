"""The weights before quantization, for methods that correct the quantization error."""

import torch

from lorainit.config.inits.quantized import LoftQ
from lorainit.context import Run
from lorainit.init.evidence import Evidence
from lorainit.model.layers.weight import weight_of
from lorainit.model.load import load_model
from lorainit.model.targets.targets import find_linear_layers


def open_original_weights(_config: LoftQ, run: Run) -> dict[str, Evidence]:
    """Each target's weight from the base model's files. They are memory-mapped, so that a weight is read when used."""
    layers = find_linear_layers(load_model(run.base.location.folder, dtype="auto", device=torch.device("cpu")))
    return {name: Evidence(original=weight_of(layers[name]).detach()) for name in run.targets}
