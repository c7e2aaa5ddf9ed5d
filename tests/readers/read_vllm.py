"""What vLLM's loader takes adapters for. JSON on stdin: adapters, modules, out (a safetensors file).

For each layer of each adapter scale·B·A, under "adapter|module".
"""

import json
import os
import sys

os.environ["VLLM_TARGET_DEVICE"] = "cpu"

import torch
from safetensors.torch import save_file
from vllm.config.lora import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

asked = json.load(sys.stdin)
found = {}
for name, folder in asked["adapters"].items():
    helper = PEFTHelper.from_local_dir(folder, max_position_embeddings=256)
    helper.validate_legal(LoRAConfig(max_lora_rank=16))
    model = LoRAModel.from_local_checkpoint(
        folder, set(asked["modules"]), helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    for module, layer in model.loras.items():
        found[f"{name}|{module}"] = (layer.scaling * layer.lora_b @ layer.lora_a).contiguous()
save_file(found, asked["out"])
