"""Jobs: what an order becomes, what is shown of it, and how it is found again."""

import csv
import io
import json
import tarfile
from datetime import UTC, datetime
from typing import Any

import openai.types.fine_tuning as typed
import pytest
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from sqlalchemy.orm import Session

from api.core.db.tables import Job
from api.core.files.storage import ObjectStorage
from api.core.jobs import jobs, lookup
from api.core.queue import queue
from lorainit.config.events import Warned
from tests import stub_worker
from tests.api.conftest import JOBS, Lab, mark, refused
from tests.promises import within
from tests.things import MODEL, a_queued_job, a_worker

pytestmark = pytest.mark.one_database


# Section by section: everything a job object always has.
FIELDS = {
    "id", "object", "created_at", "finished_at", "model", "fine_tuned_model", "organization_id", "status",
    "training_file", "validation_file", "result_files", "trained_tokens", "hyperparameters", "method", "seed", "error",
    "estimated_finish", "integrations", "metadata", "user_provided_suffix", "project_id", "priority", "on_row_error",
    "append_eos", "deterministic", "experiment_id", "queue_position", "queue_reason", "estimated_start", "resume",
    "progress", "lora", "init_report", "export_check", "resources", "warnings", "adapter",
}  # fmt: skip


@pytest.fixture
def done(lab: Lab) -> dict[str, Any]:
    """A job that went all the way."""
    job = lab.order(suffix="support")
    assert stub_worker.run_all() == 1
    shown = lab.client.get(f"{JOBS}/{job['id']}").json()
    assert shown["status"] == "succeeded"
    return shown


def test_a_minimal_order_answers_at_once_with_every_field(lab: Lab) -> None:
    job = lab.order()
    assert set(job) == FIELDS
    assert job["status"] == "validating_files"
    assert job["result_files"] == [] and job["integrations"] == []
    assert job["error"] is None and job["progress"] is None and job["trained_tokens"] is None
    assert job["hyperparameters"]["n_epochs"] == "auto"
    assert isinstance(job["seed"], int)
    assert job["organization_id"] == "org-local"
    typed.FineTuningJob.model_validate(job, strict=True)


def test_every_optional_field_may_be_null(lab: Lab) -> None:
    names = ("validation_file", "suffix", "seed", "metadata", "integrations", "method", "hyperparameters", "lora")
    job = lab.order(**dict.fromkeys((*names, "priority", "on_row_error", "append_eos", "deterministic")))
    assert (job["priority"], job["on_row_error"], job["deterministic"]) == ("normal", "fail", True)
    assert job["append_eos"] is False


def test_a_seed_is_kept_or_drawn(lab: Lab) -> None:
    assert lab.order(seed=7)["seed"] == 7
    assert lab.order()["seed"] != lab.order()["seed"]


def test_the_deprecated_hyperparameters_are_mirrored_into_the_method(lab: Lab) -> None:
    job = lab.order(hyperparameters={"n_epochs": 2})
    assert job["method"]["supervised"]["hyperparameters"]["n_epochs"] == 2
    same = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}
    assert lab.order(hyperparameters={"n_epochs": 2}, method=same)["hyperparameters"]["n_epochs"] == 2


def test_the_resolved_adapter_is_echoed(lab: Lab) -> None:
    lora = lab.order(seed=7, lora={"init": "pissa", "r": 8, "alpha": 16})["lora"]
    assert lora["init"] == {"method": "pissa", "niter": 16, "seed": 7}
    assert (lora["r"], lora["alpha"], lora["scaling"], lora["rank_pattern"]) == (8, 16.0, 2.0, {})
    assert (lora["modules"], len(lora["target_modules"])) == (210, 7)
    assert lora["trainable_parameters"] == 30 * 8 * (2 * 1152 + 2 * 768 + 3 * 2112)
    assert [choice["param"] for choice in lora["auto"]] == ["lora.use_rslora"]


def test_the_adapter_as_a_label_is_the_adapter_as_a_field(lab: Lab) -> None:
    """For gateways that drop fields they do not know."""
    wanted = {"init": {"method": "pissa", "niter": 4}, "r": 8, "alpha": 16}
    told = lab.order(seed=7, lora=wanted)
    labelled = lab.order(seed=7, lora=None, metadata={"lora_config": json.dumps(wanted), "team": "a"})
    assert labelled["lora"] == told["lora"]
    assert labelled["metadata"] == {"lora_config": json.dumps(wanted), "team": "a"}


@pytest.mark.parametrize("init", ["pissa", "lora_one", "loftq", "auto"])
def test_a_quantized_base_is_echoed(lab: Lab, init: str) -> None:
    job = lab.order(lora={"init": init, "quantization": "nf4"})
    assert job["lora"]["quantization"] == "nf4"


def test_dora_is_echoed_counted_and_named_as_the_downloads_format(lab: Lab) -> None:
    job = lab.order(lora={"init": "kaiming", "r": 8, "use_dora": True})
    assert job["lora"]["use_dora"] is True
    outputs = 2 * 576 + 2 * 192 + 2 * 1536 + 576  # q, o; k, v; gate, up; down
    assert job["lora"]["trainable_parameters"] == 30 * (8 * (2 * 1152 + 2 * 768 + 3 * 2112) + outputs)
    stub_worker.run_all()
    assert lab.client.get(f"{JOBS}/{job['id']}").json()["adapter"]["format"] == "peft_dora"


def test_trainable_parameters_are_an_estimate_until_the_ranks_are_spread(lab: Lab, session: Session) -> None:
    job = lab.order(lora={"init": "eva", "r": 8})
    assert job["lora"]["trainable_parameters_estimated"] is True
    stub_worker.tidy()
    assert stub_worker.claim()
    row = session.get_one(Job, job["id"], populate_existing=True)
    session.expunge(row)
    from api.schemas.job import make_job_object

    row.plan, row.init_report = {"trainable_parameters": 100}, {"trainable_parameters": 93}
    lora = json.loads(make_job_object(lookup.load_view(session, row)).model_dump_json())["lora"]
    assert (lora["trainable_parameters"], lora["trainable_parameters_estimated"]) == (93, False)
    assert lab.order(lora={"init": "pissa", "r": 8})["lora"]["trainable_parameters_estimated"] is False


def test_an_automatic_init_says_what_and_why(lab: Lab) -> None:
    lora = lab.order(lora={"init": "auto"})["lora"]
    choice = next(choice for choice in lora["auto"] if choice["param"] == "lora.init")
    assert lora["init"]["method"] == choice["value"]
    assert len(choice["reason"]) > 10


@pytest.mark.parametrize("suffix", ["a.b", "a-b", "a_b", "a" * 64, None])
def test_a_suffix_ends_up_in_the_models_name(lab: Lab, suffix: str | None) -> None:
    job = lab.order(suffix=suffix)
    stub_worker.run_all()
    name = lab.client.get(f"{JOBS}/{job['id']}").json()["fine_tuned_model"]
    assert name == f"ft:{MODEL}:local:{suffix or ''}:{job['id'][6:14]}"
    assert lab.client.get(f"/v1/models/{name}").json()["id"] == name


def test_a_job_with_checked_files_is_queued_and_workers_are_notified_after_the_answer(
    lab: Lab, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    notified: list[tuple[str, str]] = []
    monkeypatch.setattr(queue, "notify_workers", lambda *job: notified.append(job))
    file = lab.upload()["id"]
    mark(session, file)
    job = lab.order(file)
    assert job["status"] == "validating_files"
    row = session.get_one(Job, job["id"], populate_existing=True)
    assert row.status == "queued" and row.notified_at is not None and notified == [(job["id"], "train")]
    hyper = lab.client.get(f"{JOBS}/{job['id']}").json()["hyperparameters"]
    assert isinstance(hyper["n_epochs"], int) and isinstance(hyper["learning_rate"], float)


def test_a_job_is_accepted_while_the_broker_is_down(lab: Lab, session: Session) -> None:
    file = lab.upload()["id"]
    mark(session, file)
    row = session.get_one(Job, lab.order(file)["id"], populate_existing=True)
    assert row.status == "queued" and row.notified_at is None


def test_a_rate_alone_is_shown_with_its_multiplier(lab: Lab) -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate": 5e-4}}}
    job = lab.order(method=method)
    stub_worker.tidy()
    shown = lab.client.get(f"{JOBS}/{job['id']}").json()["hyperparameters"]
    assert shown["learning_rate"] == 5e-4
    assert shown["learning_rate_multiplier"] == pytest.approx(0.5)


def test_a_precision_is_kept_as_asked_and_an_automatic_one_is_shown_once_the_run_has_chosen(
    lab: Lab, session: Session
) -> None:
    asked = lab.order(method={"type": "supervised", "supervised": {"hyperparameters": {"precision": "bf16"}}})
    assert asked["hyperparameters"]["precision"] == "bf16"
    job = lab.order()
    stub_worker.tidy()
    assert lab.client.get(f"{JOBS}/{job['id']}").json()["hyperparameters"]["precision"] == "auto"
    stub_worker.run_all()
    shown = lab.client.get(f"{JOBS}/{job['id']}").json()
    supervised = shown["method"]["supervised"]
    assert (shown["hyperparameters"]["precision"], supervised["hyperparameters"]["precision"]) == ("fp32", "fp32")
    assert [c["value"] for c in supervised["auto"] if c["param"].endswith(".precision")] == ["fp32"]
    assert lab.client.get(f"{JOBS}/{asked['id']}").json()["hyperparameters"]["precision"] == "bf16"


def test_the_place_in_the_queue_is_counted(lab: Lab, session: Session) -> None:
    a_worker(session)
    made = [a_queued_job(session, lab.project, priority=priority) for priority in (1, 1, 2, 0)]
    session.commit()
    shown = [lab.client.get(f"{JOBS}/{job.id}").json() for job in made]
    assert [job["queue_position"] for job in shown] == [2, 3, 1, 4]
    reasons = ["waiting_for_turn", "waiting_for_turn", "waiting_for_gpu", "waiting_for_turn"]
    assert [job["queue_reason"] for job in shown] == reasons
    listed = lab.client.get(JOBS).json()["data"]
    assert {job["id"]: job["queue_position"] for job in listed} == {job["id"]: job["queue_position"] for job in shown}


def test_jobs_ahead_in_another_project_count_too(lab: Lab, stranger: Lab, session: Session) -> None:
    a_queued_job(session, stranger.project)
    job = a_queued_job(session, lab.project)
    session.commit()
    assert lab.client.get(f"{JOBS}/{job.id}").json()["queue_position"] == 2


def test_a_running_job_shows_its_progress(lab: Lab, session: Session) -> None:
    job = lab.order()
    stub_worker.tidy()
    taken = stub_worker.claim()
    assert taken is not None
    progress = {"stage": "training", "percent": 41.8, "step": 4, "remaining_seconds": 60, "updated_at": 1795313518}
    assert jobs.update_run(session, taken[1], progress=progress)
    session.commit()
    shown = lab.client.get(f"{JOBS}/{job['id']}").json()
    assert shown["status"] == "running" and shown["queue_position"] is None
    assert shown["progress"]["percent"] == 41.8 and shown["progress"]["tokens_seen"] is None
    assert shown["estimated_finish"] == 1795313518 + 60
    assert shown["resume"]["possible"] is False


def test_a_number_json_cannot_hold_is_null(lab: Lab, session: Session) -> None:
    job = lab.order()
    stub_worker.tidy()
    assert stub_worker.claim()
    row = session.get_one(Job, job["id"], populate_existing=True)
    session.expunge(row)
    from api.schemas.job import make_job_object

    row.init_report = {"loss": float("nan"), "nested": [float("inf")]}
    shown = json.loads(make_job_object(lookup.load_view(session, row)).model_dump_json())
    assert shown["init_report"] == {"loss": None, "nested": [None]}


def test_a_failed_job_says_why_and_only_it_has_an_error(lab: Lab) -> None:
    job = lab.order()
    stub_worker.tidy()
    taken = stub_worker.claim()
    assert taken is not None
    stub_worker.fail(taken[1])
    shown = lab.client.get(f"{JOBS}/{job['id']}").json()
    assert shown["error"] == {"code": "out_of_memory", "message": "The device ran out of memory.", "param": None}
    assert shown["finished_at"] is not None and shown["fine_tuned_model"] is None


def test_a_finished_job_has_its_results(lab: Lab, done: dict[str, Any]) -> None:
    assert set(done) == FIELDS and done["error"] is None
    assert done["trained_tokens"] == 30
    assert done["progress"]["percent"] == 100
    assert done["adapter"]["r"] == 16 and done["adapter"]["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert done["export_check"]["passed"] is True
    typed.FineTuningJob.model_validate(done, strict=True)


def test_a_job_that_made_the_model_worse_says_so(lab: Lab) -> None:
    job = lab.order()
    assert job["warnings"] == []
    stub_worker.tidy()
    numbers = {"start": 1.687, "end": 1.729, "learning_rate": 2e-4}
    found = Warned(code="worse_than_base", message="Try a lower rate.", data=numbers)
    claimed = stub_worker.claim()
    assert claimed
    stub_worker.train(*claimed, warnings=[found])
    shown = lab.client.get(f"{JOBS}/{job['id']}").json()
    assert (shown["status"], shown["warnings"]) == ("succeeded", [found.model_dump()])


def test_the_result_file_is_plain_csv(lab: Lab, done: dict[str, Any]) -> None:
    (file,) = done["result_files"]
    reply = lab.client.get(f"/v1/files/{file}/content")
    assert reply.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(reply.text)))
    assert reply.text.startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,")
    assert [row["step"] for row in rows] == ["1", "2", "3"]


def test_the_adapter_is_a_tar_and_the_same_file(lab: Lab, done: dict[str, Any]) -> None:
    url = f"{JOBS}/{done['id']}/adapter"
    reply = lab.client.get(url, headers={"accept-encoding": "gzip"})
    assert reply.headers["content-type"] == "application/x-tar"
    assert reply.headers["etag"] == f'"{done["adapter"]["sha256"]}"'
    assert reply.headers["content-disposition"] == f'attachment; filename="{done["id"]}.tar"'
    assert reply.headers["repr-digest"].startswith("sha-256=:")
    with tarfile.open(fileobj=io.BytesIO(reply.content)) as tar:
        assert "adapter_config.json" in tar.getnames()
    halves = [lab.client.get(url, headers={"range": span}).content for span in ("bytes=0-999", "bytes=1000-")]
    assert b"".join(halves) == reply.content
    assert lab.client.get(f"/v1/files/{done['adapter']['file_id']}/content").content == reply.content
    assert lab.client.head(url).headers["content-length"] == str(done["adapter"]["bytes"])


def test_the_adapters_file_is_deleted_with_its_model_only(lab: Lab, done: dict[str, Any]) -> None:
    refused(lab.client.delete(f"/v1/files/{done['adapter']['file_id']}"), 400, "file_in_use", "file_id")


def test_checkpoints_are_listed_and_downloadable(lab: Lab, done: dict[str, Any]) -> None:
    (point,) = lab.client.get(f"{JOBS}/{done['id']}/checkpoints").json()["data"]
    FineTuningJobCheckpoint.model_validate(point, strict=True)
    assert point["step_number"] == 3 and point["metrics"]["full_valid_loss"] is None
    assert lab.client.get(f"/v1/models/{point['fine_tuned_model_checkpoint']}").json()["type"] == "checkpoint"
    for name in (point["id"], "3"):
        reply = lab.client.get(f"{JOBS}/{done['id']}/adapter?checkpoint={name}")
        assert reply.headers["etag"] == f'"{point["sha256"]}"'
    for name in ("4", "ftckpt_x", "9" * 30):
        reply = lab.client.get(f"{JOBS}/{done['id']}/adapter?checkpoint={name}")
        refused(reply, 404, "checkpoint_not_found", "checkpoint")


def test_events_are_newest_first_numbered_without_gaps(lab: Lab, done: dict[str, Any]) -> None:
    seen: list[dict[str, Any]] = []
    after = ""
    while True:
        page = lab.client.get(f"{JOBS}/{done['id']}/events?limit=2&after={after}").json()
        seen += page["data"]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert [event["sequence"] for event in seen] == list(range(len(seen), 0, -1))
    assert {event["type"] for event in seen} <= {"message", "metrics"}
    states = [event["data"]["status"] for event in seen[::-1] if event["data"].get("kind") == "status"]
    assert states == ["validating_files", "queued", "running", "succeeded"]
    assert seen[0]["data"]["status"] == "succeeded"
    typed.FineTuningJobEvent.model_validate(seen[0], strict=True)


def test_cancel_is_immediate_and_final(lab: Lab, session: Session) -> None:
    job = lab.order()["id"]
    for _ in range(2):
        shown = lab.client.post(f"{JOBS}/{job}/cancel", headers={"content-type": "application/json"}).json()
        assert shown["status"] == "cancelled" and shown["error"] is None and shown["finished_at"] is not None
    assert stub_worker.run_all() == 0


def test_a_cancelled_run_never_succeeds(lab: Lab) -> None:
    job = lab.order()["id"]
    stub_worker.tidy()
    taken = stub_worker.claim()
    assert taken is not None
    lab.client.post(f"{JOBS}/{job}/cancel")
    with pytest.raises(stub_worker.LeaseLost):
        stub_worker.train(*taken)
    assert lab.client.get(f"{JOBS}/{job}").json()["status"] == "cancelled"


def test_a_job_is_shown_from_the_database_alone(
    lab: Lab, done: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("storage and broker are gone")

    for name in ("put", "read", "delete", "probe"):
        monkeypatch.setattr(ObjectStorage, name, gone)
    monkeypatch.setattr(queue, "notify_workers", gone)
    assert lab.client.get(f"{JOBS}/{done['id']}").json() == done
    assert lab.client.get(JOBS).json()["data"] == [done]
    assert lab.client.get(f"{JOBS}/{done['id']}/events").status_code == 200


def test_times_are_whole_seconds(lab: Lab) -> None:
    job = lab.order()
    assert abs(job["created_at"] - datetime.now(UTC).timestamp()) < within(5)


# --- resources ----------------------------------------------------------------------------------


def test_a_job_runs_alone_unless_it_asks_for_a_group(lab: Lab) -> None:
    assert lab.order()["resources"] == {"group": False, "device": "any", "devices": 1, "trained_with": None}
    assert lab.order(resources={})["resources"]["group"] is False
    assert lab.order(resources=None)["resources"]["group"] is False
    assert lab.order(resources={"group": None})["resources"]["group"] is False
    assert lab.order(resources={"group": True})["resources"]["group"] is True


def test_a_finished_job_shows_who_shared_its_run_beside_what_it_used(lab: Lab) -> None:
    job = lab.order(resources={"group": True})
    stub_worker.run_all()
    shown = lab.client.get(f"{JOBS}/{job['id']}").json()
    used = shown["resources"]
    assert set(used.pop("stage_seconds")) == {"starting", "loading", "training"}
    assert used.pop("seconds_to_first_step") >= 0
    assert used == {
        "group": True,
        "device": "any",
        "devices": 1,
        "trained_with": [],
        "gpu_name": None,
        "gpus": 0,
        "attempts": 1,
    }
    typed.FineTuningJob.model_validate(shown, strict=True)
