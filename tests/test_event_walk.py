"""docs/architecture.md says which files an event passes on its way to a client's event stream."""

import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from api.core.access import keys
from api.core.db.database import session_scope
from api.core.settings import get_settings
from tests.event_walk import make_walk
from tests.lorainit.conftest import chat, make_tokenizer, tiny_llama, write_rows
from tests.lorainit.walk import followed
from tests.things import ON_ONE_DATABASE
from tests.worker.conftest import Lab
from worker import tasks
from worker.child.supervisor import run_child

ROOT = Path(__file__).parents[1]
pytestmark = ON_ONE_DATABASE


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """A run of one step on a tiny model."""
    for part in (tiny_llama(), make_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", [chat(f"What is {n}?", "It is four.") for n in range(4)])
    model = {"id": "tiny", "source": str(tmp_path / "base"), "root": "tests/tiny", "max_length": 64}
    path = tmp_path / "spec.json"
    path.write_text(
        json.dumps({"model": model, "data": {"training": str(rows)}, "training": {"max_steps": 1, "batch_size": 4}})
    )
    return path


def test_an_event_passes_the_files_that_the_document_lists(
    service: None, environment: pytest.MonkeyPatch, tmp_path: Path, spec: Path
) -> None:
    environment.setenv("PYTHONPATH", str(ROOT))
    get_settings.cache_clear()
    lab = Lab(tmp_path, environment, count=1)
    with session_scope() as session:
        _, secret = keys.create_key(session, lab.project, name="walk")
        session.commit()
    program = (sys.executable, "-m", "tests.event_walk", str(spec), str(tmp_path / "found.json"))
    environment.setattr(tasks, "run_child", partial(run_child, program=program))
    client = TestClient(create_app(), headers={"authorization": f"Bearer {secret}"})
    with followed(make_walk()) as of_the_service:
        tasks.run_job(lab.ids[0])
        stream = client.get(f"/v1/fine_tuning/jobs/{lab.ids[0]}/events/stream")
    assert stream.text.count("event: metrics") == 1
    text = (ROOT / "docs" / "architecture.md").read_text()
    listed = re.findall(r"^\d+\. `([a-z_/]+\.py)`", text.partition("### From an event to its stream")[2], re.MULTILINE)
    of_the_library = json.loads((tmp_path / "found.json").read_text())
    assert list(of_the_library | of_the_service) == listed
