"""The running service as a user would have it, for tests: its processes, a client of it, and a look at its runs."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import psutil
from openai.types.fine_tuning import FineTuningJob

from tests import servers
from tests.lorainit.conftest import chat

WORKER = ["-m", "celery", "-A", "worker.app", "worker"]
QUIET = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
FINAL = ("succeeded", "failed", "cancelled")
PATIENCE = 900  # seconds until a test gives up hope, on however busy a machine


class Stack:
    """The running service and a client of it."""

    def __init__(self, url: str, key: str, logs: Path) -> None:
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.logs = logs

    def start(self, name: str, *words: str, **settings: str) -> subprocess.Popen[bytes]:
        log = self.logs / name
        self.processes[name] = servers.spawn([sys.executable, *words], log=log, env={**os.environ, **settings})
        return self.processes[name]

    def start_worker(self, **settings: str) -> subprocess.Popen[bytes]:
        return self.start("worker", *WORKER, *QUIET, **settings)

    def stop_worker(self) -> None:
        """Ask it to leave, and see it go."""
        self.processes["worker"].terminate()
        self.processes["worker"].wait(PATIENCE)

    def tidy(self) -> None:
        """Cancel what a test left unfinished, and have a worker again."""
        for job in self.client.fine_tuning.jobs.list():
            if job.status not in FINAL:
                self.client.fine_tuning.jobs.cancel(job.id)
        if self.processes["worker"].poll() is not None:
            self.start_worker()

    def upload(self, count: int = 16) -> str:
        rows = "".join(json.dumps(chat(f"What is {n}?", f"It is {n} and {n}")) + "\n" for n in range(count))
        return self.client.files.create(file=("rows.jsonl", io.BytesIO(rows.encode())), purpose="fine-tune").id

    def create(
        self, lora: dict[str, Any], *, rows: int = 16, group: bool = False, devices: int = 1, **recipe: Any
    ) -> FineTuningJob:
        settings = {"n_epochs": 2, "batch_size": 8, "learning_rate": 1e-2, **recipe}
        return self.client.fine_tuning.jobs.create(
            model="tiny",
            training_file=self.upload(rows),
            validation_file=self.upload(4),
            seed=3,
            method={"type": "supervised", "supervised": {"hyperparameters": settings}},  # type: ignore[typeddict-item]
            extra_body={"lora": lora, "resources": {"group": group, "devices": devices}},
        )

    def wait(self, job_id: str, *until: str, seconds: float = PATIENCE) -> FineTuningJob:
        deadline = time.monotonic() + seconds
        while (job := self.client.fine_tuning.jobs.retrieve(job_id)).status not in until:
            if job.status in FINAL or time.monotonic() > deadline:
                raise AssertionError(f"{job.status}, {job.error}\n{self.log('worker')}\n{self.log('reconciler')}")
            time.sleep(0.1)
        return job

    def messages(self, job_id: str) -> list[str]:
        events = list(self.client.fine_tuning.jobs.list_events(job_id, limit=100))
        return [event.message for event in reversed(events)]

    def log(self, name: str) -> str:
        return (self.logs / name).read_text()[-6000:]


def children_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The training processes below a worker."""
    return runs_below(psutil.Process(process.pid))


def runs_below(process: psutil.Process) -> list[psutil.Process]:
    """The training processes among the descendants of a process."""
    return [child for child in process.children(recursive=True) if _is_a_run(child)]


def _is_a_run(process: psutil.Process) -> bool:
    try:
        return "lorainit" in process.cmdline()
    except psutil.Error:  # it ended while we looked
        return False


def wait_for(look: Callable[[], Any], *, seconds: float = PATIENCE) -> Any:
    """What it finds, once it finds something."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)
    return found


def family(stack: Stack) -> list[psutil.Process]:
    return psutil.Process(stack.processes["worker"].pid).children(recursive=True)


def words_of(process: psutil.Process) -> list[str]:
    try:
        return [word for word in process.cmdline() if word]
    except psutil.Error:  # it ended while we looked
        return []
