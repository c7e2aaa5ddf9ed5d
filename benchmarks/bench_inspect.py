"""What it costs to look at a large base: `python benchmarks/bench_inspect.py` (all of `BASES`, or those named).

The bases are made here from configurations and have holes for weights, with one tensor for each expert's matrix as
on the hub. Reading and hashing weights is not measured: it costs what the disk and SHA-256 cost, a second
or more for each gigabyte. Processor seconds and peak memory of a process for each base.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from lorainit.model.layers import experts
from lorainit.model.source.examine import build, examine
from lorainit.model.targets.targets import describe

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3 8B": ("LlamaConfig", {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}),
    "Llama 3.1 405B": (
        "LlamaConfig",
        {"vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
         "num_attention_heads": 128, "num_key_value_heads": 8},
    ),
    "Gemma 3 27B, text": (
        "Gemma3TextConfig",
        {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
         "num_key_value_heads": 16, "head_dim": 128},
    ),
    "gpt-oss 120B": ("GptOssConfig", {}),
    "Qwen3 30B-A3B": (
        "Qwen3MoeConfig",
        {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
         "head_dim": 128, "num_experts": 128, "moe_intermediate_size": 768},
    ),
    "Qwen3-Next 80B": ("Qwen3NextConfig", {}),
    "GLM 4.5": (
        "Glm4MoeConfig",
        {"hidden_size": 5120, "num_hidden_layers": 92, "n_routed_experts": 160, "first_k_dense_replace": 3},
    ),
    "DeepSeek V3": ("DeepseekV3Config", {}),
    "Kimi Linear 48B": ("KimiLinearConfig", {}),
    "Jamba 1.5 Large": ("JambaConfig", {"hidden_size": 8192, "intermediate_size": 24576, "num_hidden_layers": 72}),
    "Falcon H1 34B": ("FalconH1Config", {"hidden_size": 5120, "intermediate_size": 21504, "num_hidden_layers": 72}),
}  # fmt: skip
_FUSED = ("GptOssConfig", "KimiLinearConfig")  # their experts are read as they lie in the model


def main() -> None:
    """Print a table; with `--one NAME` a row of it."""
    if sys.argv[1:2] == ["--one"]:
        return _measure(sys.argv[2])
    print("| base | tensors | processor | memory |\n|---|---|---|---|", flush=True)
    for name in sys.argv[1:] or BASES:
        subprocess.run([sys.executable, __file__, "--one", name], check=True)
    return None


def _measure(name: str) -> None:
    with tempfile.TemporaryDirectory() as room:
        tensors = _write(*BASES[name], Path(room))
        began = time.process_time()
        model = examine(Path(room))
        experts.install(model)
        describe(model)
        seconds = time.process_time() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"| {name} | {tensors:,} | {seconds:.1f} s | {memory:.2f} GB |", flush=True)


def _write(kind: str, values: dict[str, Any], folder: Path) -> int:
    """A base whose weights are holes; how many tensors its header describes."""
    config = getattr(transformers, kind)(**values)
    config.save_pretrained(folder)
    model: Any = build(config)
    weights = {n: p for n, p in model.state_dict().items() if n not in model.all_tied_weights_keys}
    shapes = [one for n, p in weights.items() for one in _stored(n, p, apart=kind not in _FUSED)]
    header, at = dict[str, Any](), 0
    for name, shape in shapes:
        end = at + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return len(shapes)


def _stored(name: str, weight: torch.Tensor, *, apart: bool) -> list[tuple[str, list[int]]]:
    """Names and shapes under which a weight lies in files; experts lie one by one."""
    stack, _, leaf = name.rpartition(".")
    if not apart or not stack.endswith(".experts") or weight.ndim != 3:
        return [(name, list(weight.shape))]
    number, out, n = weight.shape
    leaves, out = (("gate_proj", "up_proj"), out // 2) if leaf == "gate_up_proj" else ((leaf,), out)
    return [(f"{stack}.{e}.{one}.weight", [out, n]) for e in range(number) for one in leaves]


if __name__ == "__main__":
    main()
