"""Over REST a group means what it means in the engine, and a job says which layers it leaves out."""

from typing import Any

import pytest

from api.core.models import catalogue
from tests.api.conftest import JOBS, Lab, refused
from tests.things import MODEL


def kind(name: str, group: str, out: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "group": group, "out_features": out, "in_features": 64, "count": 2, **more}


GATE = kind("shared_expert_gate", "mlp", 1, reason="it is a router or gate")
TOWER = kind("fc1", "mlp", 64, reason="it belongs to a vision or audio tower", paths=["tower.layers.0-1.mlp.fc1"])


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPT-2 with a narrow layer, a gate and a tower."""
    entry = catalogue.Entry.model_validate(
        {
            "id": "tiny", "source": "/tiny", "root": "lab/tiny", "max_length": 256, "chat": True,
            "targets": [
                kind("c_attn", "attention", 192), kind("attn.c_proj", "attention", 64), kind("c_fc", "mlp", 256),
                kind("mlp.c_proj", "mlp", 64), kind("narrow", "other", 8),
            ],
            "left_out": [GATE, TOWER],
        }
    )  # fmt: skip
    monkeypatch.setattr(catalogue, "get_entries", lambda: {"tiny": entry, MODEL: entry})


def test_attention_of_a_gpt2_has_no_layer_of_its_mlp(lab: Lab) -> None:
    lora = lab.order(lora={"target_modules": "attention"})["lora"]
    assert (lora["target_modules"], lora["modules"]) == (["c_attn", "attn.c_proj"], 4)
    assert lora["left_out"] == []


def test_what_all_linear_leaves_out_is_in_the_job_with_reasons(lab: Lab) -> None:
    lora = lab.order()["lora"]  # with the default rank, 16
    assert lora["target_modules"] == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    assert {x["name"]: x["reason"] for x in lora["left_out"]} == {
        "shared_expert_gate": "it is a router or gate",
        "fc1": "it belongs to a vision or audio tower",
        "narrow": "a matrix of that name is smaller than the rank, 16",
    }


def test_what_is_left_out_has_its_full_names(lab: Lab) -> None:
    left_out = lab.order(lora={"r": 4, "target_modules": "mlp"})["lora"]["left_out"]
    assert next(layer["paths"] for layer in left_out if layer["name"] == "fc1") == ["tower.layers.0-1.mlp.fc1"]


def test_the_end_of_a_name_means_every_layer_that_ends_so(lab: Lab) -> None:
    lora = lab.order(lora={"target_modules": ["c_proj"]})["lora"]
    assert lora["target_modules"] == ["attn.c_proj", "mlp.c_proj"]


def test_a_jobs_adapter_can_be_ordered_again(lab: Lab) -> None:
    """What is left out is an answer: given back it is accepted and changes nothing."""
    first = lab.order()["lora"]
    again = {name: first[name] for name in ("r", "target_modules", "left_out")}
    assert lab.order(lora=again)["lora"]["target_modules"] == first["target_modules"]


def test_what_cannot_carry_a_lora_is_refused_by_name_with_the_reason(lab: Lab) -> None:
    body = {"model": "tiny", "training_file": lab.upload()["id"]}
    names = {"target_modules": ["c_fc", "shared_expert_gate"]}
    error = refused(
        lab.client.post(JOBS, json={**body, "lora": names}), 400, "invalid_value", "lora.target_modules[1]"
    )  # fmt: skip
    assert "it is a router or gate" in error["message"]
    narrow = {"target_modules": ["narrow"]}
    refused(lab.client.post(JOBS, json={**body, "lora": narrow}), 400, "rank_too_large", "lora.r")


def test_a_model_says_what_gets_no_lora(lab: Lab) -> None:
    limits = lab.client.get("/v1/models/tiny").json()["limits"]
    assert [x["name"] for x in limits["left_out"]] == ["shared_expert_gate", "fc1"]
    assert "narrow" in limits["target_modules"]
