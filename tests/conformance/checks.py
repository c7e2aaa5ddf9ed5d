"""The numbered checks, run inside a client's own environment against a running server.

    python checks.py config.json   →   {"number": {"ok": bool, "seen": {...}, "why": text}} on stdout

Only the client and the standard library are imported. `seen` holds no ids and no times, so that the
transcripts of three client versions can be compared word for word.
"""

import csv
import hashlib
import io
import json
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai

CONFIG = json.loads(Path(sys.argv[1]).read_text())
PROXY, KEY, MODEL, HUB = CONFIG["proxy"], CONFIG["key"], CONFIG["model"], CONFIG["hub"]
MAJOR = int(openai.__version__.split(".")[0])
ROW = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}) + "\n"
GOOD = (ROW * 20).encode()
HYPER = "method.supervised.hyperparameters"
Seen = dict[str, Any]
CHECKS: dict[str, Callable[[], Seen]] = {}


def check(number: str) -> Callable[[Callable[[], Seen]], Callable[[], Seen]]:
    def keep(function: Callable[[], Seen]) -> Callable[[], Seen]:
        CHECKS[number] = function
        return function

    return keep


def client(**options: Any) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": f"{PROXY}/v1", "api_key": KEY, **options})


CLIENT = client()
JOBS = CLIENT.fine_tuning.jobs


def log() -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{PROXY}/_log") as reply:
        return json.loads(reply.read())


def requests_of(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """The requests that `call` makes; its exception is swallowed."""
    before = len(log())
    with suppress(openai.OpenAIError):
        call()
    return log()[before:]


def drop(line: str, times: int = 1) -> None:
    body = json.dumps({"line": line, "times": times}).encode()
    urllib.request.urlopen(urllib.request.Request(f"{PROXY}/_drop", body)).close()


def raised(call: Callable[[], Any]) -> openai.APIStatusError | None:
    """The refusal that `call` ends in, if it does."""
    try:
        call()
    except openai.APIStatusError as error:
        return error
    return None


def refusal(call: Callable[[], Any], kind: type[Exception] = openai.BadRequestError) -> Seen:
    """What a caller sees of a refusal, and how many requests it took."""
    before = len(log())
    error = raised(call)
    if error is not None:
        assert isinstance(error, kind), repr(error)
        assert error.request_id and error.request_id.startswith("req_")
        assert error.response.headers["content-type"] == "application/json"
        # 3.x prints the message alone: what is wrong in a body must be named there.
        shown = error.param in str(error) if error.param and error.status_code == 400 else None
        return {
            "kind": type(error).__name__, "status": error.status_code, "code": error.code, "param": error.param,
            "param_in_text": shown, "requests": len(log()) - before,
        }  # fmt: skip
    raise AssertionError("nothing was refused")


def raw(verb: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    given = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"{PROXY}{path}", body, given, method=verb)
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, reply.read(), {name.lower(): text for name, text in reply.headers.items()}
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), {name.lower(): text for name, text in error.headers.items()}


def raw_code(verb: str, path: str, body: bytes | None = None, **headers: str) -> list[Any]:
    status, content, _ = raw(verb, path, body, **headers)
    error = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return [status, error["code"]]


def upload(content: bytes = GOOD, name: str = "train.jsonl", using: openai.OpenAI = CLIENT, **options: Any) -> Any:
    return using.files.create(file=(name, content), **{"purpose": "fine-tune", **options})


_shared: dict[str, Any] = {}


def training_file() -> str:
    """One checked file that all checks share."""
    if "file" not in _shared:
        _shared["file"] = CLIENT.files.wait_for_processing(upload().id, poll_interval=0.1, max_wait_seconds=20).id
    return str(_shared["file"])


def order(**fields: Any) -> Any:
    return JOBS.create(**{"model": MODEL, "training_file": training_file(), **fields})


def wait(job: Any, *states: str) -> Any:
    deadline = time.time() + 30
    while job.status not in states:
        assert time.time() < deadline, f"still {job.status}"
        time.sleep(0.05)
        job = JOBS.retrieve(job.id)
    return job


def finished() -> Any:
    """One job that succeeded, with a suffix; shared by all checks that only look."""
    if "job" not in _shared:
        _shared["job"] = wait(order(suffix="done"), "succeeded")
    return _shared["job"]


# --- transport and errors ----------------------------------------------------------------------


@check("1")
def addresses() -> Seen:
    urls = (f"{PROXY}/v1", f"{PROXY}/v1/", f"{PROXY}/some/prefix/v1")
    lines = [requests_of(lambda url=url: client(base_url=url).models.list())[0] for url in urls]
    assert lines[2]["path"].startswith("/some/prefix/")
    return {"lines": [each["line"] for each in lines]}


@check("2")
def wrong_keys() -> Seen:
    secrets = {"wrong": "sk-lorainit-0-x", **{name: CONFIG[name] for name in ("expired", "deleted")}}
    return {
        name: refusal(client(api_key=secret).models.list, openai.AuthenticationError)
        for name, secret in secrets.items()
    } | {"none": raw_code("GET", "/v1/models", authorization="")}


@check("3")
def other_project() -> Seen:
    theirs = client(api_key=CONFIG["other_key"])
    file, job = upload().id, order(metadata={"stub": "hold"}).id
    calls = {
        "job": lambda: theirs.fine_tuning.jobs.retrieve(job),
        "cancel": lambda: theirs.fine_tuning.jobs.cancel(job),
        "file": lambda: theirs.files.retrieve(file),
        "delete": lambda: theirs.files.delete(file),
        "content": lambda: theirs.files.content(file),
    }
    seen = {name: refusal(call, openai.NotFoundError) for name, call in calls.items()}
    use = refusal(lambda: theirs.fine_tuning.jobs.create(model=MODEL, training_file=file))
    JOBS.cancel(job)
    return {**seen, "use": use}


@check("4")
def foreign_project() -> Seen:
    return refusal(client(project=CONFIG["other_project"]).models.list, openai.AuthenticationError)


@check("5")
def unknown_project() -> Seen:
    found = client(project="proj_unknown", organization="org-x").models.list()
    return {"base": found.data[0].id}


@check("6")
def request_ids() -> Seen:
    reply = CLIENT.models.with_raw_response.list()
    name = reply.headers["x-request-id"]
    assert reply.parse()._request_id == name
    assert name in Path(CONFIG["log"]).read_text()
    return {"header": name.startswith("req_")}


@check("7")
def paging() -> Seen:
    mine = client(api_key=CONFIG["empty_key"])
    made = [upload(b"%d" % n, using=mine, purpose="evals").id for n in range(45)]
    seen: list[str] = []
    lines = requests_of(lambda: seen.extend(file.id for file in mine.files.list(limit=20)))
    assert seen == made[::-1]
    return {"requests": len(lines), "distinct": len(set(seen))}


@check("8")
def paging_while_things_change() -> Seen:
    mine = client(api_key=CONFIG["empty_key"])
    expected = [file.id for file in mine.files.list()]
    seen: list[str] = []
    page = mine.files.list(limit=20)
    while True:
        seen += [file.id for file in page.data]
        mine.files.delete(page.data[-1].id)
        upload(b"new", using=mine, purpose="evals")
        if not page.has_next_page():
            break
        page = page.get_next_page()
    assert seen == expected
    return {"same": True}


@check("10")
def a_bug() -> Seen:
    return refusal(lambda: CLIENT.get("/boom", cast_to=object), openai.InternalServerError)


@check("11")
def wrong_type() -> Seen:
    bad: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "three"}}}
    seen = refusal(lambda: order(method=bad))
    assert seen["param"] == f"{HYPER}.n_epochs" and seen["param_in_text"]
    return seen


@check("12")
def malformed() -> Seen:
    body = b'{"model": "' + b"x" * (3 << 20) + b'"}'
    return {
        "json": raw_code("POST", "/v1/fine_tuning/jobs", b"{"),
        "missing": raw_code("POST", "/v1/fine_tuning/jobs", b'{"model": "m"}'),
        "route": raw_code("GET", "/v1/nope"),
        "verb": raw_code("PUT", "/v1/fine_tuning/jobs/x", b"{}"),
        "large": raw_code("POST", "/v1/fine_tuning/jobs", body),
    }


@check("13")
def numbers() -> Seen:
    seen = {}
    for text in (
        '"n_epochs": true',
        '"n_epochs": "3"',
        '"n_epochs": 1.5',
        '"learning_rate": NaN',
        '"learning_rate": 1e400',
    ):
        body = '{"model": "m", "training_file": "f", "hyperparameters": {' + text + "}}"
        seen[text] = raw_code("POST", "/v1/fine_tuning/jobs", body.encode())
    assert {status for status, _ in seen.values()} == {400}
    return seen


@check("14")
def too_late() -> Seen:
    job = finished().id
    seen = refusal(lambda: JOBS.cancel(job))
    assert seen["requests"] == 1
    return seen


@check("17")
def too_large() -> Seen:
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.truncate(600 << 20)
        with Path(file.name).open("rb") as stream:
            seen = refusal(lambda: CLIENT.files.create(file=stream, purpose="fine-tune"), openai.APIStatusError)
    assert (seen["status"], seen["requests"]) == (413, 1)
    return seen


@check("18")
def unknown_fields() -> Seen:
    return {
        "loar": refusal(lambda: order(extra_body={"loar": {}})),
        "nitre": refusal(lambda: order(extra_body={"lora": {"init": {"method": "pissa", "nitre": 3}}})),
    }


@check("20")
def nulls() -> Seen:
    names = ("validation_file", "suffix", "seed", "metadata", "integrations", "method")
    extra = dict.fromkeys(("lora", "hyperparameters", "priority", "on_row_error", "deterministic"))
    job = order(**dict.fromkeys(names), extra_body=extra)
    return {"priority": job.priority, "init": job.lora["init"]["method"], "metadata": job.metadata}


# --- files -------------------------------------------------------------------------------------


@check("21")
def a_large_upload() -> Seen:
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.truncate(200 << 20)
        with Path(file.name).open("rb") as stream:
            made = CLIENT.files.create(file=stream, purpose="fine-tune")
    CLIENT.files.delete(made.id)
    return {"status": made.status, "bytes": made.bytes}


@check("22")
def validation() -> Seen:
    bad = b'{"messages": [{"role": "user", "content": "x"}]}\n'
    seen = {}
    for name, content in {"good": GOOD, "partly": GOOD + bad, "hopeless": b"hello\n"}.items():
        file = CLIENT.files.wait_for_processing(upload(content).id, poll_interval=0.1, max_wait_seconds=20)
        seen[name] = [file.status, file.validation["error_count"], file.status_details]
    assert [row[0] for row in seen.values()] == ["processed", "processed", "error"]
    assert "line 1" in seen["hopeless"][2]
    return seen


@check("23")
def expiry() -> Seen:
    file = upload(expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600
    return refusal(lambda: upload(expires_after={"anchor": "created_at", "seconds": 3599}))


@check("24")
def life_of_a_file() -> Seen:
    made = [upload(b"x%d" % n, purpose="user_data").id for n in range(3)]
    listed = [file.id for file in CLIENT.files.list(purpose="user_data", order="asc")]
    assert listed[-3:] == made
    assert CLIENT.files.content(made[0]).read() == b"x0"
    gone = CLIENT.files.delete(made[0])
    again = refusal(lambda: CLIENT.files.delete(made[0]), openai.NotFoundError)
    return {"deleted": gone.deleted, "object": gone.object, "again": again}


# --- jobs --------------------------------------------------------------------------------------


@check("27")
def minimal() -> Seen:
    started = time.time()
    job = order()
    took = time.time() - started
    type(job).model_validate(job.model_dump(), strict=True)
    assert took < 1, took
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
    " export_check resources adapter project_id priority on_row_error deterministic experiment_id",
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
        time.sleep(0.004 * (number % 40))
        late = raised(lambda job=job: JOBS.cancel(job.id))
        assert late is None or late.code == "invalid_job_state"
        if late is None:
            cancelled.append(job.id)
    time.sleep(0.5)
    assert {JOBS.retrieve(job).status for job in cancelled} == {"cancelled"}
    return seen


# --- retries and idempotency -------------------------------------------------------------------


@check("43")
def a_lost_order() -> Seen:
    file = training_file()
    drop("POST /v1/fine_tuning/jobs")
    before = len(log())
    reply = JOBS.with_raw_response.create(model=MODEL, training_file=file, seed=4343 + MAJOR)
    lines = [line for line in log()[before:] if line["line"] == "POST /v1/fine_tuning/jobs"]
    assert reply.headers["idempotency-replayed"] == "true"
    assert sum(each.seed == 4343 + MAJOR for each in JOBS.list(limit=20).data) == 1
    return {"retries": [line["retry"] for line in lines]}


@check("44")
def twice_on_purpose() -> Seen:
    first, second = order(seed=44), order(seed=44)
    return {"different": first.id != second.id}


@check("45")
def a_lost_upload() -> Seen:
    content = f"{MAJOR} lost".encode()
    drop("POST /v1/files")
    file = upload(content, purpose="evals")
    same = [each for each in CLIENT.files.list(purpose="evals") if each.bytes == len(content)]
    assert [each.id for each in same] == [file.id]
    assert CLIENT.files.content(file.id).read() == content
    CLIENT.files.delete(file.id)
    return {"files": len(same)}


@check("46")
def keys() -> Seen:
    header = {"Idempotency-Key": f"key-{MAJOR}"}
    first, second = (order(seed=1, extra_headers=header) for _ in range(2))
    other = refusal(lambda: order(seed=2, extra_headers=header))
    parallel = {"Idempotency-Key": f"parallel-{MAJOR}"}
    with ThreadPoolExecutor(4) as pool:
        ids = set(pool.map(lambda _: order(seed=1, extra_headers=parallel).id, range(4)))
    return {"same": first.id == second.id, "other": other, "parallel": len(ids)}


# --- models, adapters, initialization ----------------------------------------------------------


@check("48")
def models() -> Seen:
    job = wait(order(suffix="gone"), "succeeded")
    name = job.fine_tuned_model
    (point,) = JOBS.checkpoints.list(job.id).data
    listed = [model.id for model in CLIENT.models.list()]
    assert listed[:2] == [MODEL, name] and point.fine_tuned_model_checkpoint not in listed
    base = refusal(lambda: CLIENT.models.delete(MODEL))
    deleted = CLIENT.models.delete(point.fine_tuned_model_checkpoint).deleted, CLIENT.models.delete(name).deleted
    gone = refusal(lambda: CLIENT.models.retrieve(name), openai.NotFoundError)
    assert gone["code"] == "model_not_found"
    return {"base": base, "deleted": deleted, "job": JOBS.retrieve(job.id).status}


@check("49")
def suffixes() -> Seen:
    for suffix in ("a.b", "a-b", "a_b", None, "x" * 64):
        job = wait(order(suffix=suffix), "succeeded")
        assert CLIENT.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
    return {bad: refusal(lambda bad=bad: order(suffix=bad)) for bad in ("a:b", "a/b")}


@check("50")
def names_with_slashes() -> Seen:
    below = refusal(lambda: CLIENT.models.retrieve("x/limits"), openai.NotFoundError)
    return {"hub": CLIENT.models.retrieve(HUB).id, "below": below["code"]}


@check("70")
def adapter() -> Seen:
    path = f"/v1/fine_tuning/jobs/{finished().id}/adapter"
    status, whole, headers = raw("GET", path, accept_encoding="gzip")
    tag = headers["etag"].strip('"')
    assert hashlib.sha256(whole).hexdigest() == tag == finished().adapter["sha256"]
    head = raw("HEAD", path)
    parts = [raw("GET", path, range=span) for span in ("bytes=0-99", "bytes=100-")]
    assert b"".join(body for _, body, _ in parts) == whole
    old = raw("GET", path, range="bytes=0-99", if_range='"old"')
    return {
        "statuses": [status, head[0], *(part[0] for part in parts), old[0]],
        "encoding": headers.get("content-encoding"),
        "head": [len(head[1]), int(head[2]["content-length"]) == len(whole)],
    }


@check("71")
def adapter_conditions() -> Seen:
    job = order(metadata={"stub": "hold"})
    early = refusal(lambda: CLIENT.get(f"/fine_tuning/jobs/{job.id}/adapter", cast_to=object))
    JOBS.cancel(job.id)
    path = f"/v1/fine_tuning/jobs/{finished().id}/adapter"
    size = finished().adapter["bytes"]
    unchanged = raw("GET", path, if_none_match=f'"{finished().adapter["sha256"]}"')
    outside = raw("GET", path, range=f"bytes={size}-")
    assert outside[2]["content-range"] == f"bytes */{size}"
    return {"early": early, "statuses": [unchanged[0], outside[0]]}


@check("72")
def adapter_as_file() -> Seen:
    content = CLIENT.files.content(finished().adapter["file_id"]).read()
    return {"same": hashlib.sha256(content).hexdigest() == finished().adapter["sha256"]}


@check("73")
def methods() -> Seen:
    catalogue: Any = CLIENT.get("/lora/methods", cast_to=object, options={"params": {"model": MODEL}})
    for method in catalogue["data"]:
        assert method["parameters"]["additionalProperties"] is False
        hyper: Any = {"learning_rate": method["base_learning_rate"]}
        lora = {"init": method["id"], **method["recommended"]}
        job = order(method={"type": "supervised", "supervised": {"hyperparameters": hyper}}, extra_body={"lora": lora})
        assert job.lora["init"]["method"] == method["id"]
    return {"methods": [method["id"] for method in catalogue["data"]]}


@check("74")
def inits() -> Seen:
    echoes = {}
    for name, init in {"text": "pissa", "object": {"method": "pissa", "niter": 4}, "auto": "auto"}.items():
        job = order(extra_body={"lora": {"init": init}})
        echoes[name] = [job.lora["init"]["method"], [choice["param"] for choice in job.lora["auto"]]]
    wrong = [
        {"init": {"method": "kaiming", "niter": 4}},
        {"r": 193},
        {"init": "pissa", "use_dora": True},
        {"init": "orthogonal", "r": 7},
        {"init": "loram", "r": 1},
        {"init": "nope"},
    ]
    refused = [refusal(lambda lora=lora: order(extra_body={"lora": lora})) for lora in wrong]
    return {"echoes": echoes, "refused": [[each["code"], each["param"]] for each in refused]}


@check("75")
def rates() -> Seen:
    def hyper(**values: float) -> Any:
        return {"type": "supervised", "supervised": {"hyperparameters": values}}

    job = wait(order(method=hyper(learning_rate=5e-4), metadata={"stub": "hold"}), "running")
    shown = job.hyperparameters.model_dump()
    JOBS.cancel(job.id)
    both = refusal(lambda: order(method=hyper(learning_rate=5e-4, learning_rate_multiplier=2)))
    return {"rate": shown["learning_rate"], "multiplier": round(shown["learning_rate_multiplier"], 6), "both": both}


@check("85")
def document() -> Seen:
    paths = json.loads(raw("GET", "/openapi.json")[1])["paths"]
    return {"routes": sorted(f"{verb} {path}" for path, verbs in paths.items() for verb in verbs)}


def run(number: str) -> Seen:
    started = time.time()
    try:
        outcome = {"ok": True, "seen": CHECKS[number](), "why": ""}
    except Exception:
        outcome = {"ok": False, "seen": {}, "why": traceback.format_exc()}
    print(f"{number}: {time.time() - started:.1f} s {outcome['why']}", file=sys.stderr, flush=True)
    return outcome


if __name__ == "__main__":
    wanted = sys.argv[2:] or list(CHECKS)
    print(json.dumps({number: run(number) for number in wanted}))
