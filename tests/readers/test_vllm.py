"""Downloads in vLLM's own adapter loader, from its CPU wheel; its kernels are not tried."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.readers.conftest import PLAIN, Download, ask

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
READ = [*PLAIN, "eva-pattern"]


@pytest.fixture(scope="module")
def by_vllm(download: Callable[[str], Download], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """scale·B·A of every layer of every download, by one process."""
    out = tmp_path_factory.mktemp("vllm") / "found.safetensors"
    adapters = {name: str(download(name).folder) for name in READ}
    ask("vllm", "read_vllm.py", {"adapters": adapters, "modules": MODULES, "out": str(out)})
    return load_file(out)


@pytest.mark.parametrize("name", READ)
def test_vllm_takes_every_layer_for_what_it_is(
    name: str, by_vllm: dict[str, torch.Tensor], download: Callable[[str], Download]
) -> None:
    folder: Path = download(name).folder
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    layers = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    assert layers
    for layer in layers:
        module = layer.removeprefix("base_model.model.")
        A, B = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
        scale = config["alpha_pattern"].get(module, config["lora_alpha"]) / len(A)
        assert torch.allclose(by_vllm[f"{name}|{module}"], scale * B @ A, rtol=1e-5, atol=1e-6)
