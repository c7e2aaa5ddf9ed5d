"""Where bytes go and what is fetched: our own ids and the operator's catalogue decide, never a caller's words."""

import re
import socket
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.core.db.tables import Checkpoint, File
from api.core.files.storage import get_storage
from tests import stub_worker
from tests.api.conftest import JOBS, JSONL, Lab, refused

pytestmark = pytest.mark.one_database
OUT_OF_PLACE = [
    "../../../etc/passwd", "..\\..\\boot.ini", "/etc/passwd", "a/../../b", "%2e%2e%2fb", "~root/.ssh/id", "con", ".",
    "..", "$(id)", "a\nb", "a;b", "\u202e.jsonl", "x" * 255,
]  # fmt: skip
KEY = re.compile(
    r"files/proj_\w{16}/file-\w{24}"
    r"|jobs/ftjob-\w{24}/attempt-\d+/(step-\d+/(adapter|state)\.tar|adapter\.tar)"
    r"|jobs/ftjob-\w{24}/step_metrics-\d+\.csv"
)
FOREIGN_MODELS = [
    "hub:meta-llama/Llama-3-8B", "meta-llama/Llama-3-8B", "/etc", "../models", "file:///etc", "https://example.org/model",
    "package:os/__init__.py", "tiny.gguf", "smollm2-135m-instruct@main", "SMOLLM2-135M-INSTRUCT",
]  # fmt: skip


def stored(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", OUT_OF_PLACE)
def test_a_file_name_is_no_path(lab: Lab, session: Session, tmp_path: Path, name: str) -> None:
    reply = lab.client.post("/v1/files", files={"file": (name, JSONL)}, data={"purpose": "fine-tune"})
    if reply.status_code == 200:
        (row,) = session.scalars(select(File)).all()
        assert stored(tmp_path / "storage") == {row.storage_key} == {f"files/{lab.project.id}/{row.id}"}
        head = lab.client.get(f"/v1/files/{row.id}/content").headers["content-disposition"]
        assert re.fullmatch(r'attachment; filename="[A-Za-z0-9 ._()+-]*"', head)
    else:
        assert reply.status_code == 400 and stored(tmp_path / "storage") == set()


def test_everything_a_run_stores_lies_below_its_own_ids(lab: Lab, session: Session, tmp_path: Path) -> None:
    job = lab.order(suffix="..", metadata={"../x": "../../y"})
    stub_worker.run_all()
    assert lab.client.get(f"{JOBS}/{job['id']}").json()["status"] == "succeeded"
    keys = set(session.scalars(select(File.storage_key))) | set(session.scalars(select(Checkpoint.state_key)))
    assert stored(tmp_path / "storage") == keys and len(keys) == 5
    for key in keys:
        assert KEY.fullmatch(key), key
        assert lab.project.id in key or job["id"] in key


def test_a_key_that_leaves_the_folder_is_refused_by_storage_itself(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    for key in ("../outside", "a/../../outside", str(tmp_path / "outside")):
        with pytest.raises(Exception, match=r"(?i)path|not found|segment|outside"):
            list(get_storage().read(key))


@pytest.mark.parametrize("model", FOREIGN_MODELS)
def test_only_models_of_the_catalogue_are_taken_and_nothing_is_fetched(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    file = lab.upload()["id"]

    def connect(*_: object) -> None:
        raise AssertionError("it wanted to fetch something")

    monkeypatch.setattr(socket.socket, "connect", connect)
    error = refused(
        lab.client.post(JOBS, json={"model": model, "training_file": file}), 400, "model_not_available", "model"
    )
    assert "Available: smollm2-135m-instruct" in error["message"]
