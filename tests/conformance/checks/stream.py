"""The stream of events, read by the clients' own decoder."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
from harness import CLIENT, JOBS, Seen, check, finished, order, raw, wait


def follow(job: str, last: str = "") -> Any:
    headers = {"headers": {"Last-Event-ID": last}} if last else {}
    path = f"/fine_tuning/jobs/{job}/events/stream"
    return CLIENT.get(path, cast_to=object, stream=True, stream_cls=openai.Stream[object], options=headers)


def listed(job: str) -> list[str]:
    """Ids, oldest first."""
    return [event.id for event in JOBS.list_events(job, limit=100)][::-1]


@check("63")
def of_a_finished_job() -> Seen:
    job = finished().id
    seen = list(follow(job))
    assert [event["id"] for event in seen] == listed(job)
    return {"types": sorted({event["type"] for event in seen}), "keys": sorted(seen[0])}


@check("64")
def of_a_live_job_with_heartbeats() -> Seen:
    """The server under test sends one every 0.2 s of silence; the decoder shows none of them."""
    job = wait(order(metadata={"stub": "hold"}), "running").id
    ending = threading.Timer(1.0, lambda: JOBS.cancel(job))
    ending.start()
    started, seen = time.time(), [event["data"].get("status") for event in follow(job)]
    ending.join()
    assert time.time() - started > 0.9
    return {"statuses": [status for status in seen if status]}


@check("65")
def bytes_of_the_stream() -> Seen:
    status, content, headers = raw("GET", f"/v1/fine_tuning/jobs/{finished().id}/events/stream")
    # A server that is busy for a fifth of a second sends a heartbeat here, too.
    *blocks, rest = content.decode().replace(": keep-alive\n", "").split("\n\n")
    assert rest == ""
    assert all(any(line.startswith("data: ") for line in block.split("\n")) for block in blocks)
    assert not any(block.startswith(":") for block in blocks)
    shown = {name: headers[name] for name in ("content-type", "cache-control", "x-accel-buffering")}
    return {"status": status, "last": blocks[-1], "headers": shown}


@check("66")
def of_a_failing_job() -> Seen:
    job = wait(order(metadata={"stub": "fail"}), "failed").id
    *_, last = follow(job)
    return {"error": last["data"]["error"], "level": last["level"]}


def some(stream: Any, count: int) -> Iterator[str]:
    """The ids of the next few events; then the connection is cut."""
    with stream:
        for event, _ in zip(stream, range(count), strict=False):
            yield event["id"]


@check("67")
def cut_twenty_times() -> Seen:
    job = order(metadata={"stub": "long"}).id
    seen: list[str] = []
    for _ in range(20):
        seen += some(follow(job, seen[-1] if seen else ""), 2)
    seen += [event["id"] for event in follow(job, seen[-1])]
    assert seen == listed(job), (len(seen), len(listed(job)))
    return {"many": len(seen) > 45}
