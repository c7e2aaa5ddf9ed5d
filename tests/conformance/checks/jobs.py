"""Orders, states, events, checkpoints, results, cancelling."""

import csv
import io
import json
import time
from typing import Any

from harness import (
    CLIENT,
    CONFIG,
    JOBS,
    MODEL,
    Seen,
    check,
    client,
    finished,
    order,
    raised,
    raw,
    refusal,
    training_file,
    upload,
    wait,
    within,
)


@check("27")
def minimal() -> Seen:
    started = time.time()
    job = order()
    took = time.time() - started
    type(job).model_validate(job.model_dump(), strict=True)
    assert took < within(1), took
    return {"status": job.status, "results": job.result_files, "error": job.error}


@check("28")
def states() -> Seen:
    seen = {}
    for label in ("go", "fail", "hold"):
        job = order(metadata={"stub": label})
        errors = {job.status: job.error is None}
        job = wait(job, {"go": "succeeded", "fail": "failed", "hold": "running"}[label])
        if label == "hold":
            errors[job.status] = job.error is None
            job = JOBS.cancel(job.id)
        errors[job.status] = job.error is None
        seen[label] = errors
        if label == "fail":
            seen["error"] = [job.error.code, job.error.message, job.error.param]
    return seen


FIELDS = {
    "job": "id object created_at finished_at model fine_tuned_model organization_id status training_file"
    " validation_file result_files trained_tokens hyperparameters method seed error estimated_finish integrations"
    " metadata user_provided_suffix lora progress queue_position queue_reason estimated_start resume init_report"
    " export_check resources warnings adapter project_id priority on_row_error append_eos deterministic experiment_id",
    "event": "id object created_at level message type data sequence",
    "checkpoint": "id object created_at fine_tuning_job_id fine_tuned_model_checkpoint step_number metrics best bytes"
    " sha256",
    "file": "id object bytes created_at filename purpose status status_details expires_at sha256 validation",
    "model": "id object created owned_by shutdown_date type parent root fine_tuning_job_id capabilities limits",
}


@check("29")
def every_key() -> Seen:
    job = finished().id
    paths = {
        "job": f"/v1/fine_tuning/jobs/{job}",
        "event": f"/v1/fine_tuning/jobs/{job}/events",
        "checkpoint": f"/v1/fine_tuning/jobs/{job}/checkpoints",
        "file": f"/v1/files/{training_file()}",
        "model": f"/v1/models/{MODEL}",
    }
    for name, path in paths.items():
        shown = json.loads(raw("GET", path)[1])
        shown = shown["data"][0] if shown["object"] == "list" else shown
        assert set(shown) == set(FIELDS[name].split()), (name, set(shown) ^ set(FIELDS[name].split()))
    return {"objects": sorted(paths)}


@check("30")
def legacy() -> Seen:
    job = order(hyperparameters={"n_epochs": 2})
    other: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}}
    both = refusal(lambda: order(hyperparameters={"n_epochs": 2}, method=other))
    return {"n_epochs": job.method.supervised.hyperparameters.n_epochs, "both": both}


@check("31")
def metadata_limits() -> Seen:
    wrong: list[Any] = [{f"k{n}": "v" for n in range(17)}, {"k" * 65: "v"}, {"k": "v" * 513}, {"k": 1}]
    seen = [refusal(lambda labels=labels: order(metadata=labels)) for labels in wrong]
    return {"codes": [each["code"] for each in seen]}


@check("86")
def adapter_in_a_label() -> Seen:
    """Ours: what a gateway lets through that knows OpenAI's fields only."""
    job = order(metadata={"lora_config": json.dumps({"init": {"method": "pissa", "niter": 4}, "r": 8})})
    bad = [{"lora_config": text} for text in ("{", '{"rank": 8}', '{"init": "pisa"}')]
    seen = [refusal(lambda labels=labels: order(metadata=labels)) for labels in bad]
    both = refusal(lambda: order(metadata={"lora_config": "{}"}, extra_body={"lora": {"r": 8}}))
    params = {each["param"] for each in [*seen, both]}
    assert params == {"metadata.lora_config"}, params
    return {"lora": [job.lora["init"]["niter"], job.lora["r"]], "codes": [each["code"] for each in [*seen, both]]}


@check("32")
def metadata_filter() -> Seen:
    mine = client(api_key=CONFIG["empty_key"])
    file = upload(using=mine).id
    every: list[Any] = [{"team": "a b/c"}, {"team": "a b/c", "env": "dev"}, {"team": ""}, None]
    ids = [mine.fine_tuning.jobs.create(model=MODEL, training_file=file, metadata=labels).id for labels in every]

    def found(**options: Any) -> list[int]:
        return sorted(ids.index(job.id) for job in mine.fine_tuning.jobs.list(**options))

    seen = {
        "one": found(metadata={"team": "a b/c"}),
        "two": found(metadata={"team": "a b/c", "env": "dev"}),
        "none": found(metadata={}),
        "null": found(extra_query={"metadata": "null"}),
    }
    status, body, _ = raw(
        "GET", "/v1/fine_tuning/jobs?metadata%5Bteam%5D=", authorization=f"Bearer {CONFIG['empty_key']}"
    )
    seen["empty"] = [status, *(ids.index(job["id"]) for job in json.loads(body)["data"])]
    assert seen == {"one": [0, 1], "two": [1], "none": [0, 1, 2, 3], "null": [3], "empty": [200, 2]}, seen
    return seen


@check("33")
def events() -> Seen:
    job = wait(order(metadata={"stub": "long"}), "succeeded")
    seen = list(JOBS.list_events(job.id, limit=20))
    assert len(seen) >= 45 and len({event.id for event in seen}) == len(seen)
    assert [event.sequence for event in seen] == list(range(len(seen), 0, -1))
    return {"types": sorted({event.type for event in seen})}


@check("34")
def status_events() -> Seen:
    story = list(JOBS.list_events(finished().id, limit=100))[::-1]
    assert [event.sequence for event in story] == list(range(1, len(story) + 1))
    assert story[-1].data["kind"] == "status"
    return {"statuses": [event.data["status"] for event in story if event.data.get("kind") == "status"]}


@check("36")
def checkpoints() -> Seen:
    found = list(JOBS.checkpoints.list(finished().id))
    assert [point.step_number for point in found] == sorted((point.step_number for point in found), reverse=True)
    model = CLIENT.models.retrieve(found[0].fine_tuned_model_checkpoint)
    return {"steps": [point.step_number for point in found], "type": model.type, "loss": found[0].metrics.train_loss}


def result() -> Any:
    return CLIENT.files.content(finished().result_files[0])


@check("37")
def result_file() -> Seen:
    reply = result()
    rows = list(csv.DictReader(io.StringIO(reply.text)))
    assert reply.response.headers["content-type"].startswith("text/csv")
    return {"files": len(finished().result_files), "last": rows[-1]["step"]}


@check("38")
def result_columns() -> Seen:
    job = wait(order(metadata={"stub": "nan"}), "succeeded")
    rows = CLIENT.files.content(job.result_files[0]).text.splitlines()
    assert rows[2].split(",")[1] == ""
    return {"header": rows[0]}


@check("39")
def cancels() -> Seen:
    seen: Seen = {"queued": JOBS.cancel(order(metadata={"stub": "hold"}).id).status}
    job = wait(order(metadata={"stub": "hold"}), "running")
    seen["running"] = JOBS.cancel(job.id).status
    seen["again"] = JOBS.cancel(job.id).status
    failed = wait(order(metadata={"stub": "fail"}), "failed")
    seen["failed"] = refusal(lambda: JOBS.cancel(failed.id))
    cancelled = []
    for number in range(CONFIG["races"]):
        job = order(metadata={"stub": "go"})
        time.sleep(0.012 * number)  # a worker looks every tenth of a second
        late = raised(lambda job=job: JOBS.cancel(job.id))
        assert late is None or late.code == "invalid_job_state"
        if late is None:
            cancelled.append(job.id)
    time.sleep(0.5)
    assert {JOBS.retrieve(job).status for job in cancelled} == {"cancelled"}
    return seen
