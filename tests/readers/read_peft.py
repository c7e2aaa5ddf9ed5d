"""Logits of adapters by the PEFT that is installed here. JSON on stdin: cases, ids, out (a safetensors file).

Prints the warnings that were raised, as JSON.
"""

import json
import sys
import warnings

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def read(asked):
    """Write the logits; the warnings that were raised."""
    ids, found = torch.tensor([asked["ids"]]), {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for name, (folder, adapter) in asked["cases"].items():
            base = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
            model = PeftModel.from_pretrained(base, adapter)
            with torch.no_grad():
                found[name] = model.eval()(input_ids=ids).logits[0].float().contiguous()
    save_file(found, asked["out"])
    return [str(one.message) for one in said]


if __name__ == "__main__":
    print(json.dumps(read(json.load(sys.stdin))))
