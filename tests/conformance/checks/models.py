"""Models, adapter downloads, initializations, the document."""

import hashlib
import json
from typing import Any

import openai
from harness import CLIENT, HUB, JOBS, MODEL, Seen, check, finished, order, raw, refusal, wait


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
    job = order(extra_body={"lora": {"init": "kaiming", "use_dora": True}})
    echoes["dora"] = [job.lora["init"]["method"], job.lora["use_dora"]]
    wrong = [
        {"init": {"method": "kaiming", "niter": 4}},
        {"r": 193},
        {"init": "pissa", "use_dora": True},
        {"init": "orthogonal", "r": 7},
        {"init": "loram", "r": 1},
        {"init": "nope"},
        {"init": "loftq"},
        {"quantization": "int8"},
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
