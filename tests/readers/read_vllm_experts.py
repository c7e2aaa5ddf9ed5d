"""What vLLM makes of adapters on experts. JSON on stdin: adapter, model, place, mixed, modules, out.

vLLM's own loader and manager run, without its model: `place` is what its source calls the part of a layer that holds
the experts. `out` (a safetensors file) gets the factors that vLLM would hand its kernels, scale included: "A0", "B0"
and so on, experts×r×in and experts×out×r; none if vLLM finds nothing for the experts of the first layer.
"""

import importlib
import inspect
import json
import os
import sys
from types import SimpleNamespace

os.environ["VLLM_TARGET_DEVICE"] = "cpu"

import torch
from safetensors.torch import save_file
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper

asked = json.load(sys.stdin)
file, name = asked["model"]
source = importlib.import_module(f"vllm.model_executor.models.{file}")
assert f"self.{asked['place']} = " in inspect.getsource(source)
model, module = getattr(source, name), f"model.layers.0.{asked['place']}.experts"

kind = FusedMoE3DWithLoRA if model.is_3d_moe_weight and not asked["mixed"] else FusedMoEWithLoRA
# A layer of four experts on one device, in place of one that has weights.
sizes = {"local_num_experts": 4, "global_num_experts": 4, "ep_rank": 0, "use_ep": False}
layer = type("Layer", (kind,), {**sizes, "__init__": torch.nn.Module.__init__})()
layer.w13_lora_a_stacked = [torch.zeros(1, 4)]
manager = LoRAModelManager.__new__(LoRAModelManager)
config = SimpleNamespace(architectures=[name])
manager.__dict__.update(
    modules={module: layer}, packed_modules={}, is_pooling_model=False, model=SimpleNamespace(config=config),
    _enable_mixed_moe_lora_format=asked["mixed"], _is_3d_moe_model=kind is FusedMoE3DWithLoRA,
)  # fmt: skip

helper = PEFTHelper.from_local_dir(asked["adapter"], max_position_embeddings=256)
helper.validate_legal(LoRAConfig(max_lora_rank=16))
lora = LoRAModel.from_local_checkpoint(
    asked["adapter"],
    set(asked["modules"]),
    helper,
    lora_model_id=1,
    device="cpu",
    dtype=torch.float32,
    weights_mapper=model.hf_to_vllm_mapper.get_rename_mapper(),
)
lora.is_3d_lora_weight = asked["mixed"]
manager._validate_moe_lora_format(lora)
manager._create_merged_loras_inplace(lora)
found = manager._get_lora_layer_weights(lora, module)
tensors = {}
for letter, part in (("A", "lora_a"), ("B", "lora_b")):
    for number, tensor in enumerate(getattr(found, part) if found else []):
        tensors[f"{letter}{number}"] = tensor.clone()
save_file(tensors, asked["out"])
