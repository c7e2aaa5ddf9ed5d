"""The embedded service: one tree that starts whole, mends itself and dies whole."""

import json
import os
import signal
import socket
import stat
import time
import urllib.request
from pathlib import Path

import openai
import psutil
import pytest

from api.core.settings import Settings
from api.embedded.service import Service
from tests.api.cli.conftest import Served, called, environment, gone, lorainit, serving
from tests.promises import within


def tree(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def children(served: Served) -> dict[str, int]:
    found = served.info()["children"]
    assert isinstance(found, dict)
    return found


def test_what_it_prints_is_enough_to_use_it(served: Served) -> None:
    client = openai.OpenAI(base_url=served.url, api_key=served.key)
    assert [model.id for model in client.models.list()][:2] == ["tiny", "tiny-moe"]
    shown = served.output.read_text()
    assert "--model tiny " in shown  # what it suggests is what it has
    assert Path(shown.partition(" submit ")[2].split()[0]).is_file()
    assert f"OPENAI_BASE_URL={served.url}" in served.output.read_text()


def test_the_first_key_lies_nowhere_in_clear(served: Served) -> None:
    holders = [path for path in served.state.rglob("*") if path.is_file() and served.key.encode() in path.read_bytes()]
    assert holders == []


def test_others_cannot_read_the_state_folder(served: Served) -> None:
    assert stat.S_IMODE(served.state.stat().st_mode) == 0o700
    assert [path for path in served.state.rglob("*") if path.stat().st_mode & 0o077] == []


def test_a_second_service_on_the_same_folder_is_refused(served: Served) -> None:
    second = lorainit("serve", "--state", str(served.state), "--port", "0")
    assert second.returncode == 1
    assert second.stderr.startswith("error: another `lorainit serve` uses")
    assert (served.state / "service.json").exists()


ENTRY = """
[[models]]
id = "tiny"
root = "local:tiny"
source = "nowhere"
max_length = 64
chat = true
targets = [{ name = "q", group = "attention", out_features = 8, in_features = 8, count = 1 }]
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read: No such file"),
        ("[[models", "is not TOML"),
        (ENTRY.replace("max_length = 64\n", ""), "line 2: models[0].max_length (model 'tiny'): field required"),
        (
            ENTRY.replace("nowhere", "~no_such_user/x"),
            "line 5: models[0].source (model 'tiny'): There is no home folder",
        ),
        (ENTRY, "{here}/nowhere, is neither a folder nor a .gguf file"),
    ],
)
def test_a_catalogue_that_cannot_be_used_is_told_before_anything_starts(
    text: str | None, words: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "models.toml").write_text(text)
    env = environment(LORAINIT_CATALOGUE="models.toml")
    refused = called("serve", "--state", "state", "--port", "0", env=env, cwd=tmp_path)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert str(tmp_path / "models.toml") in refused.stderr
    assert words.format(here=tmp_path) in refused.stderr
    assert not (tmp_path / "state").exists()


def test_a_catalogue_that_is_refused_while_it_runs_is_told_once_with_its_reason(tmp_path: Path) -> None:
    line = {"level": "error", "event": "refused", "error": "The catalogue x, line 3:\nmodels[0].max_length: required."}
    said = list[str]()
    service = Service(Settings(state_dir=tmp_path), report=said.append)
    for child in ("api", "reconciler", "worker", "api"):
        service.pass_on(child, json.dumps(line))
    told = "api: refused: The catalogue x, line 3: models[0].max_length: required."
    assert said == [told, told]  # the second is another change


def test_a_worker_that_takes_no_job_is_told_with_its_reason(tmp_path: Path) -> None:
    said = list[str]()
    line = {"level": "error", "event": "no job is taken", "reason": "LORAINIT_WORKER_DEVICE is gpu."}
    Service(Settings(state_dir=tmp_path), report=said.append).pass_on("worker", json.dumps(line))
    assert said == ["worker: no job is taken: LORAINIT_WORKER_DEVICE is gpu."]


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = lorainit("serve", "--state", str(tmp_path / "state"), "--port", str(port))
    assert refused.returncode == 1
    assert f"127.0.0.1:{port}" in refused.stderr


def test_an_api_that_falls_comes_back_on_its_port(served: Served) -> None:
    before = children(served)["api"]
    os.kill(before, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while children(served)["api"] == before and time.monotonic() < deadline:
        time.sleep(0.1)
    # The socket stayed open meanwhile: this request waits rather than fails.
    with urllib.request.urlopen(served.url.removesuffix("/v1") + "/healthz", timeout=30) as answer:
        assert answer.status == 200
    assert "starting it again" in served.output.read_text()


def test_kill_9_takes_the_whole_tree_and_sigterm_ends_what_serves_the_folder_again(
    tmp_path: Path,
) -> None:
    with serving(tmp_path / "state") as service:
        pids = tree(service.process.pid)
        assert len(pids) >= 6  # parent, broker, reconciler, worker and its pool child, API
        service.process.kill()
        assert gone(pids, seconds=within(5))
    with serving(tmp_path / "state") as again:
        # The project has a key by now, so none is made, and the old one still works.
        assert again.key == ""
        assert "API keys exist already" in again.output.read_text()
        assert list(openai.OpenAI(base_url=again.url, api_key=service.key).models.list())
        pids = tree(again.process.pid)
        again.process.send_signal(signal.SIGTERM)
        assert again.process.wait(within(20)) == 0
        assert gone(pids, seconds=within(1))
        assert not (again.state / "service.json").exists()
