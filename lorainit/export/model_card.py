"""The README.md of a download, as a model hub understands it."""

import json
from pathlib import Path
from typing import Any

from lorainit.config.sources import LOCAL


def write(
    folder: Path,
    *,
    root: str,
    method: str,
    paper: str,
    rank: int,
    alpha: float,
    loading: dict[str, Any] | None = None,
    unpackable: bool = False,
    dora: bool = False,
    experts: bool = False,
    gguf: str | None = None,
) -> None:
    """A README.md a model hub understands.

    Args:
        loading: the arguments of `BitsAndBytesConfig` that make the base it was trained on; None = full precision.
        unpackable: bitsandbytes cannot repack that base for a CPU.
        experts: the adapter is on experts of a mixture too.
        gguf: the name of the GGUF file that the base was made from.
    """
    base, options = _nf4_card(loading) if loading else ("", "")
    unpacked = _UNPACKED_CARD if unpackable else ""
    on_hub = not root.startswith(LOCAL)
    # A card of the hub names no base that the hub does not have.
    header, place = (f"base_model: {root}\n", root) if on_hub else ("", "path/to/the/base")
    if gguf and not on_hub:
        place, options = "path/to/the/folder/of/the/file", f', gguf_file="{gguf}"{options}'
    where = "" if on_hub else _LOCAL_CARD
    where += _GGUF_CARD.format(gguf=gguf) if gguf else ""
    kind, serving = "LoRA", f"vLLM needs `--max-lora-rank` of at least {rank}."
    if dora:
        kind, serving = "DoRA", "Where only plain LoRA is served, merge it into the base first."
    if experts:
        serving += f"\n{_EXPERTS_CARD}"
    source = f"`{method}` ({paper})" if paper else f"`{method}`"
    (folder / "README.md").write_text(
        f"""---
{header}library_name: peft
pipeline_tag: text-generation
tags:
- lora
- lorainit
---

# {kind} adapter for {root}

Initialized with {source}; exported as a {"DoRA" if dora else "plain LoRA"} of rank {rank}
(`lora_alpha` {alpha:g}) that loads on the untouched base model{base}:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM{", BitsAndBytesConfig" if loading else ""}

base = AutoModelForCausalLM.from_pretrained("{place}"{options})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
{unpacked}
{where}{serving}{"" if experts else " "}`manifest.json` says exactly what ran, `init_report.json`
what the initialization did to each layer.
"""
    )


_LOCAL_CARD = """The base model is on no hub: take the very folder or file that the adapter was trained on.
`manifest.json` has the SHA-256 of its weights. """
_GGUF_CARD = """
It was trained on the weights of `{gguf}`, brought back to full precision, and checked on them. `from_pretrained` with
the folder of that file and `gguf_file="{gguf}"` loads those, and needs the package `gguf`; weights of a hub that were
never quantized are others.

"""
_EXPERTS_CARD = """
It is on experts too (`target_parameters`), and few readers know that. PEFT does from 0.20 on, with transformers 5;
with transformers 4 the experts are left out with a mere warning. vLLM leaves them out without a word where it has
other names for a layer (Mixtral, for one), and llama.cpp's conversion refuses them. For readers other than PEFT merge
it into the base first (`model.merge_and_unload()`).

"""


_UNPACKED_CARD = """
On a CPU with AVX512-BF16 bitsandbytes repacks layers in four bits when they first run in evaluation mode. Some of this
base have outputs that are no multiple of 32, where that ends with `N must be divisible by block_n`. Keep it from
repacking, before the first pass:

```python
for module in base.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
```
"""


def _nf4_card(loading: dict[str, Any]) -> tuple[str, str]:
    """Which base it was trained on, and how to load that one: the adapter fits the full-precision base too."""
    base = " and was trained on that model\nloaded in NF4 (bitsandbytes, blocks of 64, no double quantization)"
    if "llm_int8_skip_modules" in loading:
        base += ", but for the layers named in\n`llm_int8_skip_modules`: without that list it is another base"
    options = "".join(f"    {name}={_literal(value)},\n" for name, value in loading.items())
    return base, f", quantization_config=BitsAndBytesConfig(\n{options})"


def _literal(value: Any) -> str:
    """As Python, with the quotes that JSON has."""
    return str(value) if isinstance(value, bool) else json.dumps(value)
