"""Addresses, keys, projects, lists, errors."""

import tempfile
import time
from pathlib import Path
from typing import Any

import openai
from harness import (
    CLIENT,
    CONFIG,
    HYPER,
    JOBS,
    MODEL,
    PROXY,
    Seen,
    check,
    client,
    finished,
    order,
    raw_code,
    refusal,
    requests_of,
    upload,
)


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
    deadline = time.time() + 120  # the line is written once the answer has left
    while name not in Path(CONFIG["log"]).read_text():
        assert time.time() < deadline, f"{name} is not in the log"
        time.sleep(0.02)
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
    extra = dict.fromkeys(("lora", "hyperparameters", "priority", "on_row_error", "append_eos", "deterministic"))
    job = order(**dict.fromkeys(names), extra_body=extra)
    return {"priority": job.priority, "init": job.lora["init"]["method"], "metadata": job.metadata}
