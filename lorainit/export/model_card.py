"""The README.md of a download, as a model hub understands it."""

from pathlib import Path

from lorainit.inits import Quantization


def write(
    folder: Path,
    *,
    root: str,
    method: str,
    paper: str,
    rank: int,
    alpha: float,
    quantization: Quantization | None = None,
    dora: bool = False,
    experts: bool = False,
) -> None:
    """A README.md a model hub understands; `experts`: the adapter is on experts of a mixture too."""
    base, loading = _NF4_CARD if quantization else ("", "")
    kind, serving = "LoRA", f"vLLM needs `--max-lora-rank` of at least {rank}."
    if dora:
        kind, serving = "DoRA", "Where only plain LoRA is served, merge it into the base first."
    if experts:
        serving += f" {_EXPERTS_CARD}"
    source = f"`{method}` ({paper})" if paper else f"`{method}`"
    (folder / "README.md").write_text(
        f"""---
base_model: {root}
library_name: peft
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
from transformers import AutoModelForCausalLM{", BitsAndBytesConfig" if quantization else ""}

base = AutoModelForCausalLM.from_pretrained("{root}"{loading})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

{serving} `manifest.json` says exactly what ran, `init_report.json`
what the initialization did to each layer.
"""
    )


_EXPERTS_CARD = "It is on experts too (`target_parameters`), which PEFT reads from 0.20 on, with transformers 5."

# Which base it was trained on, and how to load that one: the adapter fits the full-precision base too.
_NF4_CARD = (
    " and was trained on that model\nloaded in NF4 (bitsandbytes, blocks of 64, no double quantization)",
    """, quantization_config=BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False
)""",
)
