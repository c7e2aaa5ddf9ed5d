"""Logits of adapters by the PEFT that is installed here. JSON on stdin: cases, ids, out (a safetensors file)."""

import json
import sys
import warnings

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

warnings.simplefilter("ignore")
asked = json.load(sys.stdin)
ids = torch.tensor([asked["ids"]])
found = {}
for name, (base, adapter) in asked["cases"].items():
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32), adapter)
    with torch.no_grad():
        found[name] = model.eval()(input_ids=ids).logits[0].float().contiguous()
save_file(found, asked["out"])
