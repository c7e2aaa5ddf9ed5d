"""What the checks share: the client under test, the proxy's log, refusals as a caller sees them."""

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
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


def within(seconds: float) -> float:
    """As `tests.promises.within`, which the proxy knows: the load is that of the moment of asking."""
    with urllib.request.urlopen(f"{PROXY}/_within?{seconds}") as reply:
        return float(json.loads(reply.read()))


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
        _shared["file"] = CLIENT.files.wait_for_processing(upload().id, poll_interval=0.1, max_wait_seconds=200).id
    return str(_shared["file"])


def order(**fields: Any) -> Any:
    return JOBS.create(**{"model": MODEL, "training_file": training_file(), **fields})


def wait(job: Any, *states: str) -> Any:
    deadline = time.time() + 200
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
