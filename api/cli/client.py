"""What the command line asks of a server, with the unmodified `openai` client, as any user would.

It uses no database and no local process, so it works the same with a remote server.
"""

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from openai import OpenAI, OpenAIError
from openai.types import Model
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

FINAL = ("succeeded", "failed", "cancelled")
CHECK_SECONDS = 60.0  # no longer, because the job waits for the check anyway
PAGE = 100


class Problem(Exception):
    """An error that the person at the terminal can fix. It is shown as one line."""


def connect() -> OpenAI:
    """A client of the server that the environment variables name.

    Raises:
        Problem: an address or a key is missing. There is no default, because the client's own
            default is another company's service.
    """
    for name, meaning in (("OPENAI_BASE_URL", "the server, as http://127.0.0.1:8000/v1"), ("OPENAI_API_KEY", "a key")):
        if not os.environ.get(name):
            raise Problem(f"{name} is not set. It names {meaning}; `lorainit serve` prints both.")
    if not os.environ["OPENAI_API_KEY"].isascii():
        raise Problem("OPENAI_API_KEY is not a key of a server: it contains characters that no key has.")
    return OpenAI()


def explain(error: OpenAIError) -> str:
    """One readable line: the sentence, the code and the field."""
    body = getattr(error, "body", None)
    if not isinstance(body, dict):
        cause = " ".join(str(error.__cause__ or error).split())[:300]  # cut, because it may be a whole web page
        return f"no usable answer from {os.environ.get('OPENAI_BASE_URL')}: {cause}"
    marks = [f"{name} {body[name]}" for name in ("code", "param") if body.get(name)]
    return f"{body.get('message', error)}" + (f" ({', '.join(marks)})" if marks else "")


def upload(client: OpenAI, path: Path) -> str:
    """Upload a training or validation file, wait until the server has checked its rows, and return its id.

    The wait is so that the server can refuse a job at once if its file has errors.

    Raises:
        Problem: there is no such file, or it is empty.
    """
    if not path.is_file():
        raise Problem(f"{path} is not a file.")
    if not path.stat().st_size:
        raise Problem(f"{path} is empty.")
    file = client.files.create(file=path, purpose="fine-tune")
    with suppress(RuntimeError):  # a longer check does no harm, because the job waits for it on the server
        client.files.wait_for_processing(file.id, poll_interval=0.3, max_wait_seconds=CHECK_SECONDS)
    return file.id


def parse_init(text: str) -> str | dict[str, Any]:
    """`pissa`, or an object with parameters: `{"method": "pissa", "niter": 4}`.

    Raises:
        Problem: it starts like an object and is not JSON.
    """
    if not text.lstrip().startswith("{"):
        return text
    try:
        parsed: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise Problem(f"--init is not JSON: {error}") from error
    return parsed


def submit(
    client: OpenAI,
    *,
    model: str,
    training_file: str,
    validation_file: str | None,
    hyperparameters: dict[str, Any],
    lora: dict[str, Any],
    resources: dict[str, Any],
    append_eos: bool = False,
    suffix: str | None,
    seed: int | None,
) -> FineTuningJob:
    """Create a job. Values that are None are left to the server's defaults."""
    given: Any = {key: value for key, value in hyperparameters.items() if value is not None}
    job: FineTuningJob = client.fine_tuning.jobs.create(
        model=model,
        training_file=training_file,
        validation_file=validation_file,
        suffix=suffix,
        seed=seed,
        method={"type": "supervised", "supervised": {"hyperparameters": given}},
        extra_body={
            "lora": {key: value for key, value in lora.items() if value is not None},
            "resources": resources,
            **({"append_eos": True} if append_eos else {}),
        },
    )
    return job


def retrieve(client: OpenAI, job_id: str) -> FineTuningJob:
    """The job as it is now."""
    return client.fine_tuning.jobs.retrieve(job_id)


def find_events_after(client: OpenAI, job_id: str, seen: int) -> list[FineTuningJobEvent]:
    """The events with a sequence above `seen`, oldest first."""
    newest_first = client.fine_tuning.jobs.list_events(job_id, limit=100)
    return list(takewhile(lambda event: sequence(event) > seen, newest_first))[::-1]


def sequence(event: FineTuningJobEvent) -> int:
    """The event's number within its job."""
    return int((event.model_extra or {})["sequence"])


def get_field(job: FineTuningJob, name: str) -> Any:
    """A field of ours that the client's type does not have."""
    return (job.model_extra or {}).get(name)


def download(client: OpenAI, job_id: str, folder: Path) -> Path:
    """The job's adapter, checked against its digest and unpacked into `folder`, which must not exist yet.

    Raises:
        Problem: the job has no adapter, the folder exists, or the bytes do not match the server's digest.
    """
    job = client.fine_tuning.jobs.retrieve(job_id)
    adapter = get_field(job, "adapter")
    if adapter is None:
        raise Problem(f"job {job_id} is {job.status}; it has no adapter.")
    if folder.exists():
        raise Problem(f"{folder} exists already; name another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
        archive = Path(place) / "adapter.tar"
        _fetch(client, adapter, archive)
        unpacked = Path(place) / "adapter"
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        shutil.move(unpacked, folder)
    return folder


def _fetch(client: OpenAI, adapter: dict[str, Any], archive: Path) -> None:
    digest = hashlib.sha256()
    with (
        client.files.with_streaming_response.content(adapter["file_id"]) as answer,
        archive.open("wb") as file,
    ):
        promised = {adapter["sha256"], answer.headers.get("etag", "").strip('"') or adapter["sha256"]}
        for chunk in answer.iter_bytes(1 << 20):
            digest.update(chunk)
            file.write(chunk)
    if promised != {digest.hexdigest()}:
        raise Problem(f"the download is damaged: SHA-256 {digest.hexdigest()}, promised {' and '.join(promised)}.")


def list_models(client: OpenAI, *, search: str, limit: int) -> Iterator[Model]:
    """Base models, then adapters, newest first, with `search` in their name.

    They are fetched page by page, because the client's own `list` would fetch all of them at once.
    """
    after = ""
    while limit > 0:
        query = {"limit": min(limit, PAGE), "after": after, "search": search}
        page = client.models.list(extra_query=query)
        yield from page.data
        limit -= PAGE
        if not (page.model_extra or {}).get("has_more"):
            return
        after = page.data[-1].id


def list_jobs(client: OpenAI, limit: int) -> Iterator[FineTuningJob]:
    """The newest jobs, newest first."""
    for index, job in enumerate(client.fine_tuning.jobs.list(limit=min(limit, PAGE))):
        if index == limit:
            return
        yield job
