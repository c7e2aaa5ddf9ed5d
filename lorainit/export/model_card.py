"""The README.md (model card) of a download, with the header that a model hub reads."""

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
    """Write the README.md of an adapter into `folder`.

    Args:
        loading: the arguments of `BitsAndBytesConfig` with which to load the base; None = full precision.
        unpackable: bitsandbytes cannot repack that base for a CPU, so the card says how to avoid it.
        experts: the adapter also adapts experts of a mixture.
        gguf: the name of the GGUF file that the base was converted from.
    """
    base, options = _nf4_card(loading) if loading else ("", "")
    unpacked = _UNPACKED_CARD if unpackable else ""
    on_hub = not root.startswith(LOCAL)
    # `base_model` is left out if the base is on no hub, because a hub would look for a model of that name.
    header, place = (f"base_model: {root}\n", root) if on_hub else ("", "path/to/the/base")
    if gguf:  # even if the root is on a hub, because nothing was checked on the weights there
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
It was trained on the weights of `{gguf}`, brought back to full precision, and checked on them. The lines above load
those, which needs the package `gguf`. Weights of a hub that were never quantized differ: nothing was checked on them.

"""
_EXPERTS_CARD = """
It is on experts too (`target_parameters`), and few readers know that. PEFT does from 0.20 on, with transformers 5;
with transformers 4 the experts are left out with only a warning. vLLM leaves them out without an error where it has
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
    """A sentence on the quantized base, and the options that load it.

    Without them the adapter loads on the full-precision base too, but that is not the base it was trained on.
    """
    base = " and was trained on that model\nloaded in NF4 (bitsandbytes, blocks of 64, no double quantization)"
    if "llm_int8_skip_modules" in loading:
        base += ", but for the layers named in\n`llm_int8_skip_modules`: without that list it is another base"
    options = "".join(f"    {name}={_literal(value)},\n" for name, value in loading.items())
    return base, f", quantization_config=BitsAndBytesConfig(\n{options})"


def _literal(value: Any) -> str:
    """The value as Python code, with the double quotes of JSON."""
    return str(value) if isinstance(value, bool) else json.dumps(value)
