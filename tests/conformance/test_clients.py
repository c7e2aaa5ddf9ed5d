"""The contract's numbered checks, driven by real clients of three generations.

One server, one stub worker and one recording proxy; each client runs all checks once, in its own
environment, and prints a transcript. A test looks at one line of it.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from api.core.access import keys
from api.core.db import database, migrate
from tests import servers
from tests.conformance.environments import ROOT, VERSIONS, python_of
from tests.conformance.proxy import recording
from tests.things import MODEL

SCRIPT = Path(__file__).parent / "checks"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
RACES = 10  # of each client
# The oldest and the newest see what changes between them.
MAJORS = [pytest.param(major, marks=pytest.mark.slow) if major == "2" else major for major in VERSIONS]
Transcript = dict[str, dict[str, Any]]


def numbers() -> list[str]:
    """The checks there are, read from their sources without running them."""
    sources = (ast.parse(path.read_text()) for path in sorted(SCRIPT.glob("*.py")))
    functions = (node for tree in sources for node in tree.body if isinstance(node, ast.FunctionDef))
    decorators = (node.decorator_list[0] for node in functions if node.decorator_list)
    return sorted((ast.literal_eval(call.args[0]) for call in decorators if isinstance(call, ast.Call)), key=int)


def people(url: str) -> dict[str, str]:
    """Projects and keys: ours, another's, one without objects per client, an expired and a deleted key."""
    engine = database.make_engine(url)
    migrate.upgrade(engine)
    with Session(engine) as session:
        lab, other = (keys.get_or_create_project(session, name) for name in ("lab", "other"))
        _, key = keys.create_key(session, lab, name="key")
        _, other_key = keys.create_key(session, other, name="key")
        _, expired = keys.create_key(session, lab, name="old", expires_at=datetime.now(UTC) - timedelta(days=1))
        row, deleted = keys.create_key(session, lab, name="gone")
        keys.delete_key(session, row.id)
        empty = {
            f"empty_{n}": keys.create_key(session, keys.get_or_create_project(session, n), name="k")[1]
            for n in VERSIONS
        }
        session.commit()
        known = {"key": key, "other_key": other_key, "other_project": other.id, "expired": expired, "deleted": deleted}
    engine.dispose()
    return {**known, **empty}


@pytest.fixture(scope="module")
def transcript(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Transcript]]:
    """All checks as one client saw them."""
    folder = tmp_path_factory.mktemp("conformance")
    url = f"sqlite:///{folder}/test.db"
    config = {
        **people(url),
        "model": MODEL,
        "hub": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "log": str(folder / "web.log"),
    }
    env = {**os.environ, "LORAINIT_STATE_DIR": str(folder), "LORAINIT_DATABASE_URL": url, "PYTHONPATH": str(ROOT)}
    port = servers.free_port()
    web = [sys.executable, "-m", "uvicorn", "--factory", "tests.conformance.server:create_app", "--port", str(port)]
    processes = [
        servers.spawn([*web, "--no-access-log", "--no-server-header"], log=folder / "web.log", env=env),
        servers.spawn([sys.executable, "-m", "tests.stub_worker"], log=folder / "worker.log", env=env),
    ]
    try:
        servers.wait_for(lambda: servers.listening(port), processes[0], folder / "web.log")
        with recording(f"http://127.0.0.1:{port}") as proxy:

            @cache
            def of(major: str) -> Transcript:
                given = {
                    **config,
                    "proxy": proxy.url,
                    "empty_key": config[f"empty_{major}"],
                    "races": RACES,
                }
                (folder / f"{major}.json").write_text(json.dumps(given))
                clean = {
                    name: value for name, value in os.environ.items() if "OPENAI" not in name and "PYTHON" not in name
                }
                command = [python_of(major), SCRIPT, folder / f"{major}.json"]
                done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=800, check=False)
                assert done.returncode == 0, done.stderr[-3000:]
                return json.loads(done.stdout)

            yield of
    finally:
        for process in processes:
            servers.stopped(process, servers.signal.SIGTERM)


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("number", numbers())
def test_check(transcript: Callable[[str], Transcript], major: str, number: str) -> None:
    outcome = transcript(major)[number]
    assert outcome["ok"], outcome["why"]


@pytest.mark.parametrize("major", MAJORS[:-1])
@pytest.mark.parametrize("number", numbers())
def test_every_client_sees_what_the_newest_sees(
    transcript: Callable[[str], Transcript], major: str, number: str
) -> None:
    newest = list(VERSIONS)[-1]
    assert transcript(major)[number]["seen"] == transcript(newest)[number]["seen"]
