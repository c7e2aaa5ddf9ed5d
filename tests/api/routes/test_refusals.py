"""What is refused, with which code and field, and that a refusal leaves nothing behind."""

import io
from typing import Any

import pytest
from sqlalchemy.orm import Session

from lorainit.data.formats.file_report import check_file
from tests.api.conftest import JOBS, JSONL, Lab, Traces, mark, refused
from tests.things import MODEL, ON_ONE_DATABASE, a_queued_job

pytestmark = pytest.mark.one_database
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
LORA_LABEL = "metadata.lora_config"
HYPER = "method.supervised.hyperparameters"


def hyper(**values: Any) -> dict[str, Any]:
    return {"method": {"type": "supervised", "supervised": {"hyperparameters": values}}}


def loftq(**values: Any) -> dict[str, Any]:
    return {"lora": {"quantization": "nf4", "init": {"method": "loftq", **values}}}


ORDERS: list[tuple[dict[str, Any], str, str]] = [
    # unknown fields
    ({"loar": {}}, "unknown_parameter", "loar"),
    ({"lora": {"init": {"method": "pissa", "nitre": 3}}}, "unknown_parameter", "lora.init.nitre"),
    ({"lora": {"rank": 8}}, "unknown_parameter", "lora.rank"),
    (hyper(epochs=3), "unknown_parameter", f"{HYPER}.epochs"),
    # unknown method, parameters out of range or of another type
    ({"lora": {"init": "pisa"}}, "unsupported_init_method", "lora.init.method"),
    ({"lora": {"init": {}}}, "missing_required_parameter", "lora.init.method"),
    ({"lora": {"init": {"method": "pissa", "niter": 65}}}, "invalid_value", "lora.init.niter"),
    ({"lora": {"init": {"method": "loram", "basis": "dct"}}}, "invalid_value", "lora.init.basis"),
    ({"lora": {"r": 0}}, "invalid_value", "lora.r"),
    ({"lora": {"alpha": -1}}, "invalid_value", "lora.alpha"),
    ({"lora": {"dropout": 1.0}}, "invalid_value", "lora.dropout"),
    ({"lora": "pissa"}, "invalid_type", "lora"),
    (hyper(n_epochs="three"), "invalid_type", f"{HYPER}.n_epochs"),
    (hyper(n_epochs=True), "invalid_type", f"{HYPER}.n_epochs"),
    (hyper(n_epochs="3"), "invalid_type", f"{HYPER}.n_epochs"),
    (hyper(n_epochs=1.5), "invalid_type", f"{HYPER}.n_epochs"),
    (hyper(n_epochs=51), "invalid_value", f"{HYPER}.n_epochs"),
    (hyper(batch_size=0), "invalid_value", f"{HYPER}.batch_size"),
    (hyper(learning_rate=2.0), "invalid_value", f"{HYPER}.learning_rate"),
    (hyper(learning_rate_multiplier=101), "invalid_value", f"{HYPER}.learning_rate_multiplier"),
    (hyper(learning_rate_multiplier=1e-20), "invalid_value", f"{HYPER}.learning_rate_multiplier"),
    (hyper(learning_rate=1e-4, learning_rate_multiplier=2), "invalid_value", f"{HYPER}.learning_rate_multiplier"),
    (hyper(max_length=9000), "invalid_value", f"{HYPER}.max_length"),
    (hyper(precision="fp16"), "invalid_value", f"{HYPER}.precision"),
    (hyper(optimizer={"name": "sgd"}), "invalid_value", f"{HYPER}.optimizer.name"),
    ({"seed": -1}, "invalid_value", "seed"),
    ({"seed": "7"}, "invalid_type", "seed"),
    ({"suffix": "a/b"}, "invalid_value", "suffix"),
    ({"suffix": "a:b"}, "invalid_value", "suffix"),
    ({"suffix": "a" * 65}, "invalid_value", "suffix"),
    ({"metadata": {f"k{n}": "v" for n in range(17)}}, "invalid_value", "metadata"),
    ({"metadata": {"k": "v" * 513}}, "invalid_value", "metadata.k"),
    ({"metadata": {"k": 1}}, "invalid_type", "metadata.k"),
    ({"metadata": {"k" * 65: "v"}}, "invalid_value", f"metadata.{'k' * 65}"),
    ({"metadata": {"k": "a\x00b"}}, "invalid_value", "metadata.k"),
    # the adapter as a label
    ({"metadata": {"lora_config": "loram"}}, "invalid_value", LORA_LABEL),
    ({"metadata": {"lora_config": '"loram"'}}, "invalid_type", LORA_LABEL),
    ({"metadata": {"lora_config": '{"r": NaN}'}}, "invalid_value", LORA_LABEL),
    ({"metadata": {"lora_config": "[" * 500}}, "invalid_value", LORA_LABEL),
    ({"metadata": {"lora_config": '{"r": 0}'}}, "invalid_value", LORA_LABEL),
    ({"metadata": {"lora_config": '{"r": "8"}'}}, "invalid_type", LORA_LABEL),
    ({"metadata": {"lora_config": '{"rank": 8}'}}, "unknown_parameter", LORA_LABEL),
    ({"metadata": {"lora_config": '{"init": "pisa"}'}}, "unsupported_init_method", LORA_LABEL),
    ({"metadata": {"lora_config": '{"init": {}}'}}, "missing_required_parameter", LORA_LABEL),
    ({"metadata": {"lora_config": '{"init": "pissa", "dropout": 0.1}'}}, "unsupported_combination", LORA_LABEL),
    ({"metadata": {"lora_config": " " * 513}}, "invalid_value", LORA_LABEL),
    ({"metadata": {"lora_config": '{"r": 8}'}, "lora": {"r": 8}}, "invalid_value", LORA_LABEL),
    ({"priority": "urgent"}, "invalid_value", "priority"),
    ({"on_row_error": "ignore"}, "invalid_value", "on_row_error"),
    ({"append_eos": 1}, "invalid_type", "append_eos"),
    ({"deterministic": 1}, "invalid_type", "deterministic"),
    ({"resources": {"group": "yes"}}, "invalid_type", "resources.group"),
    ({"resources": {"devices": 2}}, "invalid_value", "resources.devices"),
    ({"resources": {"devices": 0}}, "invalid_value", "resources.devices"),
    ({"resources": {"devices": 2, "group": True}}, "invalid_value", "resources.devices"),
    ({"resources": {"gpus": 2}}, "unknown_parameter", "resources.gpus"),
    # combinations that mean nothing
    (
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"shard_base": True}}}},
        "unsupported_combination",
        "method.supervised.hyperparameters.shard_base",
    ),
    ({"lora": {"init": "orthogonal", "r": 7}}, "unsupported_combination", "lora.r"),
    ({"lora": {"init": "loram", "r": 1}}, "unsupported_combination", "lora.r"),
    ({"lora": {"init": "pissa", "dropout": 0.1}}, "unsupported_combination", "lora.dropout"),
    ({"lora": {"init": "pissa", "use_dora": True}}, "unsupported_combination", "lora.use_dora"),
    (
        {"lora": {"init": {"method": "lora_one", "version": "v1"}, "use_dora": True}},
        "unsupported_combination",
        "lora.use_dora",
    ),
    ({"lora": {"use_dora": True, "quantization": "nf4"}}, "unsupported_combination", "lora.use_dora"),
    # rank above a target's dimensions, no such target
    ({"lora": {"r": 193}}, "rank_too_large", "lora.r"),
    ({"lora": {"r": 2000}}, "invalid_value", "lora.r"),
    ({"lora": {"init": "lora_ga", "r": 128, "target_modules": ["k_proj"]}}, "rank_too_large", "lora.init"),
    (
        {"lora": {"init": {"method": "hrp", "preheat_rank": 193}, "target_modules": ["v_proj"]}},
        "rank_too_large",
        "lora.init",
    ),
    ({"lora": {"init": {"method": "loram", "rank_factor": "log_half_r"}, "r": 2}}, "unsupported_combination", "lora.r"),
    ({"lora": {"target_modules": ["q_proj", "lm_head"]}}, "invalid_value", "lora.target_modules[1]"),
    # not in the catalogue
    ({"model": "gpt-4o-mini"}, "model_not_available", "model"),
    # files
    ({"training_file": "file-doesnotexist"}, "file_not_found", "training_file"),
    ({"validation_file": "file-doesnotexist"}, "file_not_found", "validation_file"),
    # planned, or never offered
    ({"method": {"type": "dpo", "dpo": {}}}, "not_supported", "method.type"),
    ({"method": {"type": "reinforcement"}}, "unsupported_method", "method.type"),
    ({"method": {"type": "magic"}}, "invalid_value", "method.type"),
    ({"method": {"type": "supervised", "dpo": {}}}, "invalid_value", "method.dpo"),
    # quantized bases: a width that is planned, a method that needs one, what does not go with one
    ({"lora": {"quantization": "int8"}}, "not_supported", "lora.quantization"),
    ({"lora": {"quantization": "int4"}}, "invalid_value", "lora.quantization"),
    ({"lora": {"init": "loftq"}}, "unsupported_combination", "lora.quantization"),
    ({"lora": {"use_dora": True, "quantization": "nf4"}}, "unsupported_combination", "lora.use_dora"),
    (loftq(bits=8), "not_supported", "lora.init.bits"),
    (loftq(bits=3), "invalid_value", "lora.init.bits"),
    (loftq(iterations=5), "unsupported_combination", "lora.init.iterations"),
    (loftq(iterations=0), "invalid_value", "lora.init.iterations"),
    ({"integrations": [{"type": "wandb"}]}, "integration_not_configured", "integrations"),
    ({"hyperparameters": {"n_epochs": 2}, **hyper(n_epochs=3)}, "invalid_value", "hyperparameters"),
]


@pytest.mark.parametrize(("fields", "code", "param"), ORDERS, ids=lambda value: str(value)[:60])
@ON_ONE_DATABASE
def test_a_wrong_order_is_refused_with_its_field(
    lab: Lab, traces: Traces, fields: dict[str, Any], code: str, param: str
) -> None:
    body = {"model": MODEL, "training_file": lab.upload()["id"], **fields}
    before = traces()
    error = refused(lab.client.post(JOBS, json=body), 400, code, param)
    assert param.split(".")[-1].split("[")[0] in error["message"]
    assert traces() == before


@pytest.mark.parametrize("name", ["model", "training_file"])
def test_a_required_field_is_missed(lab: Lab, name: str) -> None:
    body = {"model": MODEL, "training_file": "file-x"}
    del body[name]
    refused(lab.client.post(JOBS, json=body), 400, "missing_required_parameter", name)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400"])
def test_a_number_that_is_none_is_refused(lab: Lab, number: str) -> None:
    body = '{"model": "m", "training_file": "f", "hyperparameters": {"learning_rate": ' + number + "}}"
    reply = lab.client.post(JOBS, content=body, headers={"content-type": "application/json"})
    refused(reply, 400, "invalid_value", "hyperparameters.learning_rate")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'"x"', "invalid_json"),
        (b"\xff{", "invalid_json"),
        (b"", "invalid_json"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(lab: Lab, body: bytes, code: str) -> None:
    refused(lab.client.post(JOBS, content=body, headers={"content-type": "application/json"}), 400, code)


def test_half_a_surrogate_pair_is_refused(lab: Lab) -> None:
    body = b'{"model": "m", "training_file": "f", "metadata": {"k": "\\ud800"}}'
    reply = lab.client.post(JOBS, content=body, headers={"content-type": "application/json"})
    refused(reply, 400, "invalid_value", "metadata.k")


def test_a_file_of_another_project_is_not_found(lab: Lab, stranger: Lab, traces: Traces) -> None:
    theirs = stranger.upload()["id"]
    before = traces()
    refused(
        lab.client.post(JOBS, json={"model": MODEL, "training_file": theirs}), 400, "file_not_found", "training_file"
    )
    assert traces() == before


def test_a_file_with_another_purpose_is_refused(lab: Lab, traces: Traces) -> None:
    file = lab.upload(purpose="evals")["id"]
    before = traces()
    reply = lab.client.post(JOBS, json={"model": MODEL, "training_file": file})
    refused(reply, 400, "invalid_file_purpose", "training_file")
    assert traces() == before


def test_the_training_file_cannot_be_the_validation_file(lab: Lab) -> None:
    file = lab.upload()["id"]
    reply = lab.client.post(JOBS, json={"model": MODEL, "training_file": file, "validation_file": file})
    refused(reply, 400, "invalid_value", "validation_file")


def calibrated(file: str) -> dict[str, Any]:
    return {"init": {"method": "lora_one", "calibration_file": file}}


def test_a_calibration_file_is_checked_like_the_training_file(lab: Lab, stranger: Lab, traces: Traces) -> None:
    good, foreign = lab.upload()["id"], stranger.upload()["id"]
    other = lab.upload(purpose="evals")["id"]
    before = traces()
    for file, code in (("file-none", "file_not_found"), (foreign, "file_not_found"), (other, "invalid_file_purpose")):
        reply = lab.client.post(JOBS, json={"model": MODEL, "training_file": good, "lora": calibrated(file)})
        refused(reply, 400, code, "lora.init.calibration_file")
    reply = lab.client.post(JOBS, json={"model": MODEL, "training_file": good, "lora": calibrated("a\x00b")})
    refused(reply, 400, "invalid_value", "lora.init.calibration_file")
    assert traces() == before


def test_a_calibration_file_known_to_be_bad_is_refused(lab: Lab, session: Session) -> None:
    good, bad = lab.upload()["id"], lab.upload()["id"]
    report = {"kind": "chat", "rows": 3, "valid_rows": 2, "error_count": 1, "errors": [{"line": 2}]}
    mark(session, bad, validation=report, status_details="1 of 3 rows is invalid")
    reply = lab.client.post(JOBS, json={"model": MODEL, "training_file": good, "lora": calibrated(bad)})
    error = refused(reply, 400, "invalid_training_file", "lora.init.calibration_file")
    assert "Lines: 2" in error["message"]


def test_a_method_that_looks_at_no_data_takes_no_calibration_file(lab: Lab) -> None:
    file = lab.upload()["id"]
    init = {"method": "loram", "calibration_file": file}
    reply = lab.client.post(JOBS, json={"model": MODEL, "training_file": file, "lora": {"init": init}})
    refused(reply, 400, "unknown_parameter", "lora.init.calibration_file")


def test_a_calibration_file_is_shown_and_cannot_be_deleted_while_its_job_is_open(lab: Lab) -> None:
    file = lab.upload()["id"]
    job = lab.order(lora=calibrated(file))
    assert job["lora"]["init"]["calibration_file"] == file
    refused(lab.client.delete(f"/v1/files/{file}"), 400, "file_in_use", "file_id")
    lab.client.post(f"{JOBS}/{job['id']}/cancel")
    assert lab.client.delete(f"/v1/files/{file}").status_code == 200


BAD_FILES = [
    (b"", "the file has no rows", []),
    (b"hello\nworld\n", "invalid_json", [1, 2]),
    (b'{"messages": [{"role": "user", "content": "\xff"}]}\n', "invalid_utf8", [1]),
    (JSONL + b'{"messages": [{"role": "user", "content": "x"}]}\n', "example_missing_assistant_message", [21]),
]


@pytest.mark.parametrize(("content", "reason", "lines"), BAD_FILES, ids=["empty", "not-jsonl", "not-utf8", "bad-row"])
@pytest.mark.parametrize("field", ["training_file", "validation_file"])
def test_a_file_known_to_be_bad_is_refused_with_its_lines(
    lab: Lab, session: Session, traces: Traces, content: bytes, reason: str, lines: list[int], field: str
) -> None:
    good, bad = lab.upload()["id"], lab.upload(content)["id"]
    report = check_file(io.BytesIO(content))
    mark(session, bad, status=report.status, status_details=report.status_details, validation=report.model_dump())
    before = traces()
    reply = lab.client.post(JOBS, json={"model": MODEL, "training_file": good, field: bad})
    error = refused(reply, 400, f"invalid_{field}", field)
    assert reason in error["message"]
    assert all(str(line) in error["message"] for line in lines)
    assert traces() == before


def test_bad_rows_can_be_skipped(lab: Lab, session: Session) -> None:
    file = lab.upload()["id"]
    mark(session, file, validation={"kind": "chat", "rows": 3, "valid_rows": 2, "error_count": 1, "errors": []})
    assert lab.order(file, on_row_error="skip")["on_row_error"] == "skip"


def test_an_end_token_can_be_asked_for(lab: Lab) -> None:
    job = lab.order(append_eos=True)
    assert job["append_eos"] is True
    assert lab.client.get(f"{JOBS}/{job['id']}").json()["append_eos"] is True


def test_a_preference_file_cannot_train_supervised(lab: Lab, session: Session) -> None:
    file = lab.upload()["id"]
    mark(session, file, validation={"kind": "preference", "rows": 3, "valid_rows": 3, "error_count": 0})
    reply = lab.client.post(JOBS, json={"model": MODEL, "training_file": file})
    refused(reply, 400, "invalid_training_file", "training_file")


def test_a_finished_job_cannot_be_cancelled(lab: Lab, session: Session, traces: Traces) -> None:
    from api.core.jobs import jobs

    job = a_queued_job(session, lab.project)
    (taken,) = jobs.claim(session, "w", lease_seconds=30)
    assert jobs.fail(session, jobs.Lease(taken.id, taken.lease_token), jobs.Failure("out_of_memory", "Too large."))
    session.commit()
    before = traces()
    error = refused(lab.client.post(f"{JOBS}/{job.id}/cancel"), 400, "invalid_job_state")
    assert "failed" in error["message"]
    assert traces() == before


def test_an_adapter_is_not_ready_before_the_end(lab: Lab) -> None:
    job = lab.order()
    error = refused(lab.client.get(f"{JOBS}/{job['id']}/adapter"), 400, "adapter_not_ready")
    assert "validating_files" in error["message"]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"purpose": "assistants"}, "invalid_value", "purpose"),
        ({"purpose": "fine-tune-results"}, "invalid_value", "purpose"),
        ({"expires_after[anchor]": "created_at"}, "invalid_value", "expires_after[seconds]"),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "invalid_value", "expires_after[anchor]"),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"},
            "invalid_value",
            "expires_after[seconds]",
        ),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "9e9"},
            "invalid_value",
            "expires_after[seconds]",
        ),
        ({"colour": "blue"}, "unknown_parameter", "colour"),
    ],
)
def test_a_wrong_upload_is_refused_and_leaves_nothing(
    lab: Lab, traces: Traces, fields: dict[str, str], code: str, param: str
) -> None:
    before = traces()
    reply = lab.client.post("/v1/files", files={"file": ("a.jsonl", JSONL)}, data={"purpose": "fine-tune", **fields})
    refused(reply, 400, code, param)
    assert traces() == before


def test_an_upload_without_its_parts_is_refused(lab: Lab) -> None:
    refused(lab.client.post("/v1/files", data={"purpose": "fine-tune"}), 400, "missing_required_parameter", "file")
    reply = lab.client.post("/v1/files", files={"file": ("a", b"x")})
    refused(reply, 400, "missing_required_parameter", "purpose")
    reply = lab.client.post("/v1/files", files={"purpose": (None, "fine-tune"), "file": (None, "text")})
    refused(reply, 400, "invalid_type", "file")
    refused(lab.client.post("/v1/files", json={"purpose": "fine-tune"}), 400, "missing_required_parameter", "file")


@pytest.mark.parametrize("cut", [40, 200, 1000])
def test_a_broken_upload_is_refused_and_leaves_nothing(lab: Lab, traces: Traces, cut: int) -> None:
    before = traces()
    parts = (
        b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + JSONL + b"\r\n--B--\r\n"
    )
    headers = {"content-type": "multipart/form-data; boundary=B"}
    reply = lab.client.post("/v1/files", content=parts[:cut], headers=headers)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] in ("file", "purpose")
    assert traces() == before


def test_a_file_above_the_limit_is_refused_and_leaves_nothing(
    lab: Lab, traces: Traces, environment: pytest.MonkeyPatch
) -> None:
    from api.core.settings import get_settings

    environment.setenv("LORAINIT_MAX_UPLOAD_BYTES", "100")
    get_settings.cache_clear()
    before = traces()
    reply = lab.client.post("/v1/files", files={"file": ("a.jsonl", JSONL)}, data={"purpose": "fine-tune"})
    refused(reply, 413, "file_too_large", "file")
    assert traces() == before


def test_a_body_above_the_limit_is_refused(lab: Lab) -> None:
    body = b'{"model": "' + b"a" * (3 * 2**20) + b'"}'
    headers = {"content-type": "application/json"}
    refused(lab.client.post(JOBS, content=body, headers=headers), 413, "request_too_large")
    chunked = lab.client.post(JOBS, content=(body[i : i + 65536] for i in range(0, len(body), 65536)), headers=headers)
    refused(chunked, 413, "request_too_large")
