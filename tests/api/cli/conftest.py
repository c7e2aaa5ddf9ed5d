"""`lorainit serve` as a person starts it, on a tiny model; the command line as a child process and in this one."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from openai import OpenAI
from typer.testing import CliRunner

from api.cli import client, commands, console
from lorainit import __main__ as library
from lorainit.model import sandbox
from lorainit.model.inspect import inspect
from lorainit.runtime.refusal import as_unsupported
from tests import hub, servers
from tests.conftest import forget
from tests.lorainit.conftest import chat, make_tokenizer, tiny_llama, write_rows
from tests.zoo.bases import make


def environment(**more: str) -> dict[str, str]:
    """This shell without any trace of a service it may be set up for."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("LORAINIT_", "OPENAI_"))}
    return {**bare, **more}


def lorainit(
    *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end, in a process of its own."""
    command = [sys.executable, "-m", "api.cli", *arguments]
    return subprocess.run(
        command, env=env or environment(), cwd=cwd, capture_output=True, text=True, check=False, timeout=900
    )


def called(
    *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The same command in this process, which saves the second that Python and its imports take: for what it says and
    does, where nothing depends on its being a process. A base in a folder is inspected here, too.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ, env or environment(), clear=True):
        for stream in (console.out, console.err):
            patch.setattr(stream, "_width", console._PIPE_COLUMNS)
        clients, connect = list[OpenAI](), client.connect
        patch.setattr(commands.subprocess, "run", _run)
        patch.setattr(client, "connect", lambda: clients.append(connect()) or clients[-1])
        if cwd is not None:
            patch.chdir(cwd)
        forget()
        try:
            done = CliRunner().invoke(commands.app, arguments)
        finally:
            for one in clients:
                one.close()
            forget()
            os.umask(umask)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


_run_in_a_process = subprocess.run


def _run(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run`, but `python -m lorainit inspect` runs here, unless it has to know of another hub from its
    start.
    """
    if command[1:4] != ["-m", "lorainit", "inspect"] or "HF_ENDPOINT" in os.environ:
        return _run_in_a_process(command, **options)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output:
        patch.setattr(sandbox, "_run_child", _inspect)
        code = library.main(command[3:])
    return subprocess.CompletedProcess(command, code, output.getvalue().encode())


def _inspect(command: list[str]) -> dict[str, Any]:
    """What the confined process of the sandbox finds: `... inspect SOURCE --cache FOLDER --confined`."""
    with as_unsupported("The base model cannot be inspected"):
        return inspect(command[4], cache=Path(command[6])).model_dump(mode="json")


@dataclass
class Served:
    """A running `lorainit serve`."""

    process: subprocess.Popen[bytes]
    state: Path
    url: str
    key: str
    output: Path

    def info(self) -> dict[str, object]:
        return json.loads((self.state / "service.json").read_text())

    def shell(self) -> dict[str, str]:
        return environment(OPENAI_BASE_URL=self.url, OPENAI_API_KEY=self.key)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return called(*arguments, env=self.shell(), cwd=self.state)

    def run_alone(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return lorainit(*arguments, env=self.shell(), cwd=cwd or self.state)


@contextmanager
def serving(state: Path, *options: str, **env: str) -> Iterator[Served]:
    """`lorainit serve` on a free port until the block ends."""
    output = state.parent / f"{state.name}-{time.monotonic_ns()}.out"
    command = [sys.executable, "-m", "api.cli", "serve", "--state", str(state), "--port", "0", *options]
    process = servers.spawn(command, log=output, env=environment(**env))
    try:
        servers.wait_for(lambda: "Try," in output.read_text(), process, output)
        url = json.loads((state / "service.json").read_text())["url"]
        shown = output.read_text().partition("shown only now: ")[2]
        yield Served(process, state, url, shown.split()[0] if shown else "", output)
    finally:
        servers.stopped(process, servers.signal.SIGTERM, patience=30)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp("tiny-cli") / "model"
    tiny_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hub_environment(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables that lead to a hub on this host, which offers a tiny mixture as Lab/Mixture."""
    mixture = make("mixtral", tiny.parent / "mixture")
    with hub.serving({"Lab/Mixture": hub.Repository({"main": mixture})}) as running:
        yield {"HF_ENDPOINT": running.url, "HF_HOME": str(tmp_path_factory.mktemp("hf"))}


@pytest.fixture(scope="session")
def catalogue(tiny: Path, hub_environment: dict[str, str]) -> Path:
    """A catalogue that offers a tiny model and a tiny mixture of a hub, written by `lorainit models inspect`."""
    path = tiny.parent / "catalogue.toml"
    entries = [
        called("models", "inspect", source, "--id", name, env=environment(**more), cwd=tiny.parent)
        for source, name, more in (("model", "tiny", {}), ("Lab/Mixture", "tiny-moe", hub_environment))
    ]
    assert all(entry.returncode == 0 for entry in entries), entries
    path.write_text("\n".join(entry.stdout for entry in entries))
    return path


@pytest.fixture(scope="session")
def served(
    tmp_path_factory: pytest.TempPathFactory, catalogue: Path, hub_environment: dict[str, str]
) -> Iterator[Served]:
    """One service for all tests that do it no harm."""
    state = tmp_path_factory.mktemp("served") / "state"
    with serving(state, LORAINIT_CATALOGUE=str(catalogue), **hub_environment) as service:
        yield service


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen rows for the tiny model."""
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    return write_rows(path, [chat(f"What is {n}?", f"It is {n} and {n}") for n in range(16)])


def gone(pids: list[int], *, seconds: float) -> bool:
    """Are all these processes gone within `seconds`?"""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(_alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
