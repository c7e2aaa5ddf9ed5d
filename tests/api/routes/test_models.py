"""Models and initialization methods: what there is, and what can go."""

from typing import Any

import jsonschema
import pytest

from api.core.models import catalogue
from api.schemas.model import make_method_object
from lorainit.config.inits import INITS
from lorainit.config.rates import RATES
from tests import stub_worker
from tests.api.conftest import JOBS, Lab, Traces, refused
from tests.things import MODEL

pytestmark = pytest.mark.one_database
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
FIELDS = {
    "id", "object", "created", "owned_by", "shutdown_date", "type", "parent", "root", "fine_tuning_job_id",
    "capabilities", "limits",
}  # fmt: skip


@pytest.fixture
def done(lab: Lab) -> dict[str, Any]:
    job = lab.order()
    stub_worker.run_all()
    return lab.client.get(f"{JOBS}/{job['id']}").json()


def test_models_are_bases_then_adapters_and_no_checkpoints(lab: Lab, done: dict[str, Any]) -> None:
    listed = lab.client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == [MODEL, done["fine_tuned_model"]]
    assert all(set(model) == FIELDS for model in listed["data"])
    assert listed["has_more"] is False
    base, adapter = listed["data"]
    assert base["limits"]["max_r"] == 192 and base["type"] == "base"
    assert base["limits"]["quantization"] == ["nf4"]
    assert (adapter["parent"], adapter["root"], adapter["limits"]) == (MODEL, HUB, None)
    assert adapter["fine_tuning_job_id"] == done["id"]


@pytest.mark.parametrize("name", [MODEL, HUB, HUB.replace("/", "%2F")])
def test_a_base_is_found_by_id_and_hub_name(lab: Lab, name: str) -> None:
    assert lab.client.get(f"/v1/models/{name}").json()["id"] == MODEL


@pytest.mark.parametrize("name", ["nope", f"{MODEL}/limits", "ft:a:b:c:d"])
def test_an_unknown_model_is_a_404(lab: Lab, name: str) -> None:
    refused(lab.client.get(f"/v1/models/{name}"), 404, "model_not_found", "model")


def test_an_order_by_hub_name_shows_the_id(lab: Lab) -> None:
    assert lab.order(model=HUB)["model"] == MODEL


def test_a_base_cannot_be_deleted(lab: Lab) -> None:
    refused(lab.client.delete(f"/v1/models/{MODEL}"), 400, "model_not_deletable")


def test_a_deleted_adapter_takes_its_checkpoints_and_bytes_but_not_its_job(
    lab: Lab, done: dict[str, Any], traces: Traces
) -> None:
    name = done["fine_tuned_model"]
    stored = traces()["stored"]
    assert lab.client.delete(f"/v1/models/{name}").json() == {"id": name, "object": "model", "deleted": True}
    assert traces()["stored"] == stored - 3  # adapter, checkpoint, its state
    refused(lab.client.get(f"/v1/models/{name}"), 404, "model_not_found", "model")
    refused(lab.client.delete(f"/v1/models/{name}"), 404, "model_not_found", "model")
    again = lab.client.delete(f"/v1/models/{name}", headers={"x-stainless-retry-count": "1"})
    assert again.json()["deleted"] is True
    job = lab.client.get(f"{JOBS}/{done['id']}").json()
    assert job["status"] == "succeeded" and job["adapter"] is None and job["fine_tuned_model"] == name
    assert lab.client.get(f"{JOBS}/{done['id']}/checkpoints").json()["data"] == []
    assert lab.client.get(f"/v1/files/{job['result_files'][0]}/content").status_code == 200
    refused(lab.client.get(f"{JOBS}/{done['id']}/adapter"), 404, "model_not_found")


def test_a_checkpoint_can_be_deleted_alone(lab: Lab, done: dict[str, Any]) -> None:
    (point,) = lab.client.get(f"{JOBS}/{done['id']}/checkpoints").json()["data"]
    assert lab.client.delete(f"/v1/models/{point['fine_tuned_model_checkpoint']}").status_code == 200
    assert lab.client.get(f"{JOBS}/{done['id']}/checkpoints").json()["data"] == []
    assert lab.client.get(f"/v1/models/{done['fine_tuned_model']}").status_code == 200


def test_continuing_from_an_adapter_is_planned(lab: Lab, done: dict[str, Any]) -> None:
    body = {"model": done["fine_tuned_model"], "training_file": done["training_file"]}
    refused(lab.client.post(JOBS, json=body), 400, "not_supported", "model")


# --- initialization methods --------------------------------------------------------------------


def test_every_method_is_listed_with_its_facts(lab: Lab) -> None:
    listed = lab.client.get("/v1/lora/methods").json()
    assert [method["id"] for method in listed["data"]] == list(INITS)
    for method in listed["data"]:
        default = INITS[method["id"]].model_validate({"method": method["id"]})
        assert (method["needs"], method["maturity"]) == ([default.facts.needs], default.facts.maturity)
        assert (method["offset"], method["export_rank"]) == (default.offset, default.export_rank)
        assert method["function_preserving"] == default.function_preserving
        assert method["supports"]["dora"] == (default.offset == "none" and method["id"] != "loftq")
        assert method["base_learning_rate"] is None
        assert method["supports"]["quantization"] == ["nf4"]
        assert method["recommended"]["quantization"] == ("nf4" if method["id"] == "loftq" else None)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("loram", (["weight"], "subtract", True, "2r", "stable")),
        ("lora_ga", (["gradient"], "subtract", True, "2r", "stable")),
        ("lora_one", (["gradient"], "none", False, "r", "stable")),
        ("hrp", (["preheat"], "none", True, "r", "experimental")),
        ("eva", (["activation"], "none", True, "per module", "stable")),
        ("corda", (["activation"], "subtract", True, "2r", "stable")),
        ("loftq", (["weight"], "none", False, "r", "stable")),
    ],
)
def test_the_catalogue_says_what_a_method_does_by_default(lab: Lab, name: str, facts: tuple[object, ...]) -> None:
    method = lab.client.get(f"/v1/lora/methods/{name}").json()
    told = ("needs", "offset", "function_preserving", "export_rank", "maturity")
    assert tuple(method[field] for field in told) == facts


def test_a_model_fills_in_rate_and_availability(lab: Lab) -> None:
    reply = lab.client.get(f"/v1/lora/methods?model={MODEL}&r=7").json()
    methods = {method["id"]: method for method in reply["data"]}
    assert methods["olora"]["base_learning_rate"] == RATES["olora"][0].value
    assert methods["orthogonal"]["available"] is False and methods["pissa"]["available"] is True


def test_loftq_is_not_available_on_a_base_that_cannot_be_quantized() -> None:
    entry = catalogue.require(MODEL)
    narrow = entry.model_copy(update={"targets": [entry.targets[0].model_copy(update={"in_features": 96})]})
    for base, fits in ((entry, True), (narrow, False)):
        assert make_method_object("loftq", entry=base, r=8).available is fits
        assert make_method_object("kaiming", entry=base, r=8).available is True


def test_an_unknown_method_or_model_is_refused(lab: Lab) -> None:
    refused(lab.client.get("/v1/lora/methods/nope"), 404, "unsupported_init_method", "method")
    refused(lab.client.get("/v1/lora/methods?model=nope"), 400, "model_not_available", "model")


@pytest.mark.parametrize("name", INITS)
def test_a_methods_schema_is_what_orders_are_checked_against(lab: Lab, name: str) -> None:
    method = lab.client.get(f"/v1/lora/methods/{name}").json()
    jsonschema.Draft202012Validator.check_schema(method["parameters"])
    init = {"method": name}
    jsonschema.validate(init, method["parameters"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**init, "unknown": 1}, method["parameters"])
    job = lab.order(lora={"init": init, **method["recommended"]})
    assert job["lora"]["init"]["method"] == name
