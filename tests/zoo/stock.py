"""The other side of every comparison: stock transformers with eager attention, stock PEFT, one row at a time.

Knows nothing of Lorainit. `python -m tests.zoo.stock FOLDER` is the process of its own that reads downloads:
FOLDER/readings.json is a list of {"base", "adapter", "precision", "attention", "rows"}; the logits of every row go to
FOLDER/NUMBER.safetensors, what went wrong to FOLDER/NUMBER.error.
"""

import gc
import json
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.float32}


def load_base(folder: Path, precision: str, attention: str, four_bits: dict[str, Any] | None = None) -> Any:
    """The untouched base in fp32, bf16, or NF4 as these arguments of `BitsAndBytesConfig` say."""
    options: dict[str, Any] = {}
    if precision == "nf4":
        four = BitsAndBytesConfig(**(four_bits or {}))
        options = {"quantization_config": four, "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[precision], attn_implementation=attention, local_files_only=True, **options
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # else bitsandbytes computes in bf16 on such CPUs
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def load_adapted(folder: Path, adapter: Path, precision: str, attention: str) -> Any:
    """The base with a download on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT 0.21 asks transformers 5.23 by an old name
        base = load_base(folder, precision, attention, _four_bits(adapter) if precision == "nf4" else None)
        return PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()


def _four_bits(adapter: Path) -> dict[str, Any]:
    """What a download says of its base; its README has the same lines."""
    said: dict[str, Any] = json.loads((adapter / "manifest.json").read_text())["base"]["quantization"]["bitsandbytes"]
    return said


@torch.no_grad()
def logits(model: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    """Float32 logits, length×vocabulary, of each row alone."""
    return [model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in rows]


def loss_and_gradients(model: Any, rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, dict[str, Tensor]]:
    """Mean loss of the trained tokens of all rows, and its gradients by the names of PEFT's files.

    Args:
        rows: (ids, which of them the loss looks at).
    """
    count = sum(int(trained[1:].sum()) for _, trained in rows)
    total = 0.0
    for ids, trained in rows:
        found = model(input_ids=ids[None], use_cache=False).logits[0, :-1][trained[1:]].float()
        loss = F.cross_entropy(found, ids[1:][trained[1:]], reduction="sum") / count
        loss.backward()
        total += loss.item()
    named = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return total, get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)


def adapted_share(model: Any) -> float:
    """How much of the weights in matrices carries a LoRA; embeddings and the output head are not counted."""
    bare = model.get_base_model()
    left_out = {
        id(m.weight) for m in bare.modules() if isinstance(m, nn.Embedding) or m is bare.get_output_embeddings()
    }
    adapted = {id(weight) for module in bare.modules() if isinstance(module, LoraLayer) for weight in _weights(module)}
    sizes = {
        id(p): p.numel()
        for n, p in bare.named_parameters()
        if p.ndim > 1 and "lora_" not in n and id(p) not in left_out
    }
    return sum(size for key, size in sizes.items() if key in adapted) / max(1, sum(sizes.values()))


def _weights(module: Any) -> list[Tensor]:
    if hasattr(module, "parameter_name"):  # a LoRA on a parameter: the experts of a mixture
        return [module.get_param()]
    return [module.get_base_layer().weight]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for number, reading in enumerate(json.loads((folder / "readings.json").read_text())):
        try:
            _read(reading, folder / f"{number}.safetensors")
        except Exception:
            (folder / f"{number}.error").write_text(traceback.format_exc())
        gc.collect()


def _read(reading: dict[str, Any], out: Path) -> None:
    base, adapter, rows = Path(reading["base"]), Path(reading["adapter"]), [torch.tensor(r) for r in reading["rows"]]
    attention = reading["attention"]
    model = load_adapted(base, adapter, reading["precision"], attention)
    found = {f"{i}": x for i, x in enumerate(logits(model, rows))}
    found["share"] = torch.tensor(adapted_share(model))
    if reading["precision"] == "bf16":
        found |= {f"exact.{i}": x for i, x in enumerate(logits(load_adapted(base, adapter, "fp32", attention), rows))}
    save_file(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
