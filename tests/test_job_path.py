"""One job's path through the real thing: read this first.

A web process, a reconciler, a Celery worker and a Valkey broker are started as a user would have
them, on PostgreSQL, with a secret planted wherever one can stand. A stock `openai` client orders an adapter on a tiny
random model; stock PEFT loads what comes back. In the end the secrets are in no log, event or row
(tests/secrets_of_a_run.py). The whole service on SQLite: tests/api/cli.
"""

import csv
import io
import json
import tarfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from openai.types.fine_tuning import FineTuningJob
from sqlalchemy import Engine

from api.core.access import keys
from api.core.db.database import session_scope
from tests import secrets_of_a_run, servers
from tests.conftest import empty, forget, point_at
from tests.lorainit.conftest import chat
from tests.promises import within
from tests.stack import PATIENCE, Stack, children_of, family, wait_for, words_of
from tests.things import ON_ONE_DATABASE, ON_POSTGRESQL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, database_url: str) -> Path:
    """Where the service keeps its files and its logs."""
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def started(database_url: str, engine: Engine, tiny_base: Path, folder: Path) -> Iterator[Stack]:
    """One service for all tests of a kind of database. Its client's key is that of an admin."""
    with pytest.MonkeyPatch.context() as patch, servers.valkey() as broker:
        point_at(patch, secrets_of_a_run.with_password(database_url), folder)
        for name, value in {**secrets_of_a_run.plant(broker), "LORAINIT_LOG_LEVEL": "debug"}.items():
            patch.setenv(name, value)
        patch.setenv("LORAINIT_CATALOGUE", str(tiny_base / "catalogue.toml"))
        patch.setenv("LORAINIT_LEASE_SECONDS", "600")  # none runs out, however busy the machine is
        patch.setenv("LORAINIT_DEVICES_PER_JOB", "3")
        with session_scope() as session:
            project = keys.get_or_create_project(session, "lab")
            _, secret = keys.create_key(session, project, name="test", role="admin")
            session.commit()
        with running(secret, folder) as service:
            yield service
    empty(engine)
    forget()


@pytest.fixture
def stack(started: Stack) -> Iterator[Stack]:
    """The running service, which the next test finds as this one did: nothing to do, and a worker."""
    yield started
    started.tidy()


@contextmanager
def running(secret: str, logs: Path) -> Iterator[Stack]:
    """The processes of a service with the settings of this process."""
    with servers.web({}, log=logs / "web") as url:
        service = Stack(url, secret, logs)
        service.start("reconciler", "-m", "worker.reconciler")
        service.start_worker()
        try:
            yield service
        finally:
            for process in service.processes.values():
                servers.stopped(process, servers.signal.SIGTERM)


@pytest.fixture(scope="module")
def trained(started: Stack) -> FineTuningJob:
    """A job that has succeeded."""
    created = started.create({"init": "loram", "r": 4})
    assert created.status == "validating_files"
    return started.wait(created.id, "succeeded")


def metrics_of(stack: Stack, job: FineTuningJob) -> list[dict[str, str]]:
    """The rows of a job's metrics file."""
    return list(csv.DictReader(io.StringIO(stack.client.files.content(job.result_files[0]).text)))


@ON_POSTGRESQL  # on SQLite: tests/api/cli/test_commands.py
def test_a_job_is_ordered_and_trained(stack: Stack, trained: FineTuningJob) -> None:
    """It says what ran, and the numbers are there as events, metrics file and checkpoints."""
    job = trained
    assert job.error is None
    assert job.lora["init"]["method"] == "loram"  # type: ignore[attr-defined]
    assert job.init_report["function_preserving"] is True  # type: ignore[attr-defined]
    assert job.export_check["passed"] is True  # type: ignore[attr-defined]
    assert job.progress["percent"] == 100  # type: ignore[attr-defined]
    story = stack.messages(job.id)
    assert story[0].startswith("Created fine-tuning job")
    assert story[-1] == "The job has successfully completed"
    assert [row["step"] for row in metrics_of(stack, job)] == ["0", "1", "2", "3", "4"]
    assert [c.step_number for c in stack.client.fine_tuning.jobs.checkpoints.list(job.id)] == [4, 2]
    assert job.fine_tuned_model in [model.id for model in stack.client.models.list()]


@ON_POSTGRESQL
def test_the_download_is_a_plain_peft_adapter_and_holds_the_validation_loss_of_its_job(
    stack: Stack, trained: FineTuningJob, tiny_base: Path, tmp_path: Path
) -> None:
    tar = stack.client.files.content(trained.adapter["file_id"]).read()  # type: ignore[attr-defined]
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        archive.extractall(tmp_path / "adapter", filter="data")
    reported = float(metrics_of(stack, trained)[-1]["full_valid_loss"])
    assert loss_with_stock_peft(tiny_base / "model", tmp_path / "adapter") == pytest.approx(reported, abs=1e-4)


def loss_with_stock_peft(base: Path, adapter: Path) -> float:
    """Mean loss over the trained tokens of the four validation rows, as PEFT and transformers alone compute it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT uses an old name of transformers
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    losses: list[float] = []
    for n in range(4):
        asked = [{"role": "user", "content": f"What is {n}?"}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        text = prompt + f"It is {n} and {n}<|im_end|>"
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        skip = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        with torch.no_grad():
            logits = model(ids).logits[0, skip - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, ids[0, skip:], reduction="none").tolist()
    return sum(losses) / len(losses)


@ON_POSTGRESQL
def test_cancel_stops_the_training_process_within_five_seconds(stack: Stack) -> None:
    job = stack.create({"init": "kaiming", "r": 4}, n_epochs=50, batch_size=1)
    stack.wait(job.id, "running")
    deadline = time.monotonic() + PATIENCE
    while not children_of(stack.processes["worker"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children_of(stack.processes["worker"])
    cancelled_at = time.monotonic()
    assert stack.client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    while children_of(stack.processes["worker"]):
        assert time.monotonic() - cancelled_at < within(5)
        time.sleep(0.05)
    assert stack.messages(job.id)[-1] == "The job was cancelled"


@pytest.mark.slow
@ON_ONE_DATABASE
def test_the_second_run_of_a_slot_is_split_off_what_has_torch_loaded(stack: Stack) -> None:
    stack.wait(stack.create({"init": "kaiming", "r": 2}, n_epochs=1).id, "succeeded")
    ready = wait_for(lambda: [one for one in family(stack) if words_of(one)[-2:] == ["lorainit.warm", "ready"]])
    job = stack.create({"init": "kaiming", "r": 2}, n_epochs=50)
    (run, *_) = wait_for(lambda: children_of(stack.processes["worker"]))
    assert run.parent() == ready[0]
    assert any(job.id in word for word in words_of(run))
    stack.client.fine_tuning.jobs.cancel(job.id)
    wait_for(lambda: not children_of(stack.processes["worker"]), seconds=within(5))
    assert ready[0].is_running()
    stack.wait(stack.create({"init": "kaiming", "r": 2}, n_epochs=1).id, "succeeded")


def assert_started_anew_after_every(story: list[str], loss: str) -> None:
    """Once, as a rule; a machine so busy that a lease runs out once more than the test wants is no fault."""
    assert any(loss in message for message in story), story
    lost = sum("worker was lost" in message or "was killed (signal 9)" in message for message in story)
    assert story.count("Fine-tuning job started") == 1 + lost, story


@pytest.mark.slow  # with a script in the run's place, on PostgreSQL: tests/chaos/test_repairs.py
@ON_ONE_DATABASE
def test_a_killed_worker_loses_no_job(stack: Stack) -> None:
    stack.stop_worker()
    worker = stack.start_worker(LORAINIT_LEASE_SECONDS="6")
    job = stack.create({"init": "kaiming", "r": 4}, n_epochs=6)  # long enough to be killed before its end
    stack.wait(job.id, "running")
    runs = wait_for(lambda: children_of(worker))
    worker.kill()
    worker.wait()
    stack.start_worker()
    assert stack.wait(job.id, "succeeded").status == "succeeded"
    assert_started_anew_after_every(stack.messages(job.id), "worker was lost")
    assert not any(run.is_running() for run in runs)


@ON_POSTGRESQL
def test_a_run_that_cannot_work_fails_with_code_and_field(stack: Stack) -> None:
    rows = json.dumps(chat("Say <|im_end|> please", "no")) + "\n"
    file = stack.client.files.create(file=("bad.jsonl", io.BytesIO(rows.encode())), purpose="fine-tune")
    job = stack.client.fine_tuning.jobs.create(model="tiny", training_file=file.id, extra_body={"lora": {"r": 4}})
    failed = stack.wait(job.id, "failed")
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")
    assert "line 1" in failed.error.message.lower()
    assert "Traceback" not in json.dumps(failed.to_dict())


@ON_POSTGRESQL
def test_grouped_jobs_train_in_one_process_and_each_ends_on_its_own(stack: Stack) -> None:
    """Three wait behind a running one; one of them is cancelled while they train."""
    first = stack.create({"init": "kaiming", "r": 4}, n_epochs=20)
    stack.wait(first.id, "running")
    waiting = [
        stack.create({"init": init, "r": r}, group=True, n_epochs=epochs)
        for init, r, epochs in (("loram", 4, 2), ("pissa", 2, 50), ("kaiming", 8, 3))
    ]
    loram, pissa, kaiming = (job.id for job in waiting)
    stack.wait(loram, "succeeded")
    assert stack.client.fine_tuning.jobs.cancel(pissa).status == "cancelled"
    stack.wait(kaiming, "succeeded")
    for job_id, others in ((loram, {pissa, kaiming}), (kaiming, {loram, pissa})):
        job = stack.client.fine_tuning.jobs.retrieve(job_id)
        assert set(job.resources["trained_with"]) == others  # type: ignore[attr-defined]
        assert job.export_check["passed"] is True  # type: ignore[attr-defined]
        assert list(stack.client.fine_tuning.jobs.checkpoints.list(job_id))
    assert any("trained together with" in text for text in stack.messages(pissa))
    # The process is gone with its last member, and the worker takes the next job.
    stack.wait(stack.create({"init": "gaussian", "r": 2}).id, "succeeded")


@pytest.mark.slow  # processes of one run: tests/lorainit/runtime/distributed; that they start: test_warm.py
@ON_ONE_DATABASE
def test_a_job_on_two_devices_is_two_processes_and_one_job(stack: Stack) -> None:
    """Ends like any other, and when it is cancelled both processes go."""
    job = stack.wait(stack.create({"init": "pissa", "r": 4}, devices=2).id, "succeeded")
    assert job.resources["devices"] == 2  # type: ignore[attr-defined]
    assert job.export_check["passed"] is True  # type: ignore[attr-defined]
    events = stack.messages(job.id)
    assert len(events) == len(set(events)), "only one of the two processes speaks"
    divided = stack.wait(stack.create({"init": "pissa", "r": 4}, devices=2, shard_base=True).id, "succeeded")
    assert divided.export_check["passed"] is True  # type: ignore[attr-defined]
    assert any(text.startswith("Each of 2 devices holds a part") for text in stack.messages(divided.id))
    long = stack.create({"init": "kaiming", "r": 4}, devices=2, n_epochs=50)
    stack.wait(long.id, "running")
    deadline = time.monotonic() + PATIENCE
    while len(runs := children_of(stack.processes["worker"])) < 2:
        assert time.monotonic() < deadline, runs
        time.sleep(0.05)
    assert stack.client.fine_tuning.jobs.cancel(long.id).status == "cancelled"
    _, left = psutil.wait_procs(runs, timeout=20)
    assert not left


@pytest.mark.slow  # the run ends as the process that fell: test_world.py; the job goes back: test_machine_failures.py
@ON_ONE_DATABASE
def test_a_job_that_loses_one_of_its_two_processes_is_tried_again(stack: Stack) -> None:
    """From its last checkpoint: nobody knows why the process was killed, and the job is not to blame."""
    job = stack.create({"init": "kaiming", "r": 4}, rows=32, devices=2, n_epochs=50, checkpoint_interval=10)
    deadline = time.monotonic() + PATIENCE
    while not list(stack.client.fine_tuning.jobs.checkpoints.list(job.id)):
        assert time.monotonic() < deadline, stack.log("worker")
        time.sleep(0.05)
    leading = next(run for run in children_of(stack.processes["worker"]) if "--events-fd" in run.cmdline())
    (companion,) = leading.children()
    companion.kill()
    assert stack.wait(job.id, "succeeded").error is None
    assert_started_anew_after_every(stack.messages(job.id), "was killed (signal 9)")


@ON_POSTGRESQL
def test_a_job_with_an_automatic_initialization_is_what_a_plain_one_with_that_choice_is(stack: Stack) -> None:
    """It goes on from its best candidate's checkpoint, so every step has the numbers of an uninterrupted run."""
    automatic = {"method": "auto", "candidates": ["kaiming", "loram"], "probe_steps": 16}
    chosen = stack.wait(stack.create({"init": automatic, "r": 4}, max_steps=24).id, "succeeded")
    init = chosen.lora["init"]["method"]  # type: ignore[attr-defined]
    assert init in automatic["candidates"]
    plain = stack.wait(stack.create({"init": init, "r": 4}, max_steps=24).id, "succeeded")
    found, expected = metrics_of(stack, chosen), metrics_of(stack, plain)
    assert [row["step"] for row in found] == [row["step"] for row in expected] == [str(step) for step in range(25)]
    for name in ("train_loss", "learning_rate", "tokens"):
        values = [(float(one[name]), float(other[name])) for one, other in zip(found[1:], expected[1:], strict=True)]
        assert all(one == pytest.approx(other, rel=1e-4) for one, other in values), name
    assert float(found[-1]["full_valid_loss"]) == pytest.approx(float(expected[-1]["full_valid_loss"]), rel=1e-4)
    computed = [text for text in stack.messages(chosen.id) if text.startswith("Fine-tuning job started")]
    assert len(computed) == 1 and any("goes on from step" in text for text in stack.messages(chosen.id))


@ON_POSTGRESQL
def test_a_worker_that_is_asked_to_leave_gives_its_job_back(stack: Stack) -> None:
    job = stack.create({"init": "kaiming", "r": 4}, n_epochs=50, batch_size=1)
    stack.wait(job.id, "running")
    stack.stop_worker()
    again = stack.wait(job.id, "queued")
    assert again.resources is None or again.resources.get("attempts", 0) == 0  # type: ignore[attr-defined]


@ON_POSTGRESQL
def test_no_log_no_event_and_no_row_of_a_run_holds_a_secret(started: Stack, trained: FineTuningJob) -> None:
    """The last test of the file, since it breaks the service: errors are where secrets get out."""
    planted = [*secrets_of_a_run.PASSWORDS.values(), *secrets_of_a_run.keys_of(started)]
    bad = started.client.files.create(file=("bad.jsonl", io.BytesIO(b"{}\n")), purpose="fine-tune").id
    failed = started.client.fine_tuning.jobs.create(model="tiny", training_file=bad)
    assert started.wait(failed.id, "failed").status == "failed"
    secrets_of_a_run.be_refused(started)
    secrets_of_a_run.break_things(started)

    texts = {path.name: path.read_text("utf-8", "replace") for path in started.logs.iterdir() if path.is_file()}
    assert trained.id in texts["worker"]
    assert "rate_limit_suspended" in texts["web"] and "unhandled" in texts["web"]  # the errors were really logged
    rows = list(secrets_of_a_run.rows())
    found = {f"{name}: {text[:300]}" for name, text in texts.items() for word in planted if word in text}
    found |= {row[:300] for row in rows for word in planted if word in row}
    assert found == set()
    assert any(trained.id in row for row in rows)
