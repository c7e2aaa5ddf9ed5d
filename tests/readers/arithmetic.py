"""What an adapter must do, by its file's numbers alone: W + (alpha/r)·B·A in every layer it names.

Of experts, in each expert's matrix: the file has A of all experts below each other, and B in columns k·E + e.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D


def logits(base: Path, ids: list[int], *adapters: tuple[Path, float]) -> torch.Tensor:
    """Of the base with these adapters merged, each times its factor, by stock transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        for folder, factor in adapters:
            _merge(model, folder, factor)
        return model(input_ids=torch.tensor([ids])).logits[0]


def _merge(model: torch.nn.Module, folder: Path, factor: float) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if ".experts" in name:
            _merge_experts(model, name, factor * config["lora_alpha"] / config["r"], tensors)
            continue
        module = model.get_submodule(name)
        W = module.weight.T if isinstance(module, Conv1D) else module.weight
        A, B = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
        r = config["rank_pattern"].get(name, config["r"])
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        merged = W.double() + factor * alpha / r * B @ A
        magnitude = tensors.get(f"base_model.model.{name}.lora_magnitude_vector")
        if magnitude is not None:
            merged *= (magnitude.double() / merged.norm(dim=1))[:, None]
        W.copy_(merged.float())


def _merge_experts(model: torch.nn.Module, name: str, scale: float, tensors: dict[str, torch.Tensor]) -> None:
    parent = model.get_submodule(name.removesuffix(".base_layer"))
    parameter = parent.gate_up_proj if name.endswith(".base_layer") else parent.down_proj
    assert isinstance(parameter, torch.nn.Parameter)
    for W, product in zip(parameter, products(name, len(parameter), tensors), strict=True):
        W += (scale * (product.T if parent.is_transposed else product)).float()


def products(name: str, experts: int, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """B·A of every expert, out×in in float64; `name` as in the file, without `lora_A.weight`."""
    A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    return [B[:, e::experts] @ one for e, one in enumerate(A.chunk(experts))]
