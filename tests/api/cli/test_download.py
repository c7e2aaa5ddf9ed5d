"""What `lorainit download` refuses, against a server that lies."""

import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from openai import OpenAI

from api.cli.client import Problem, download

JOB = {
    "id": "ftjob-1",
    "object": "fine_tuning.job",
    "created_at": 1,
    "model": "tiny",
    "status": "succeeded",
    "result_files": [],
    "hyperparameters": {},
    "organization_id": "org-local",
    "seed": 1,
    "training_file": "file-1",
}


class Liar:
    """A server with one job and one tar."""

    def __init__(self) -> None:
        self.tar, self.sha256, self.etag = b"", None, None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = self.path.endswith("/content")
                sha256 = outer.sha256 or hashlib.sha256(outer.tar).hexdigest()
                job = {**JOB, "adapter": {"file_id": "file-2", "sha256": sha256}}
                body = outer.tar if content else json.dumps(job).encode()
                self.send_response(200)
                self.send_header("content-type", "application/x-tar" if content else "application/json")
                self.send_header("content-length", str(len(body)))
                self.send_header("etag", f'"{outer.etag or sha256}"')
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.client = OpenAI(base_url=f"http://127.0.0.1:{self.server.server_port}/v1", api_key="sk-x")


@pytest.fixture
def liar() -> Iterator[Liar]:
    liar = Liar()
    thread = threading.Thread(target=liar.server.serve_forever)
    thread.start()
    yield liar
    liar.client.close()
    liar.server.shutdown()
    thread.join()
    liar.server.server_close()


def tar(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_an_honest_tar_is_unpacked(liar: Liar, tmp_path: Path) -> None:
    liar.tar = tar(**{"adapter_config.json": b"{}"})
    assert (download(liar.client, "ftjob-1", tmp_path / "out") / "adapter_config.json").read_bytes() == b"{}"


@pytest.mark.parametrize("promise", ["sha256", "etag"])
def test_bytes_other_than_promised_are_refused(liar: Liar, tmp_path: Path, promise: str) -> None:
    liar.tar = tar(**{"adapter_config.json": b"{}"})
    setattr(liar, promise, "0" * 64)
    with pytest.raises(Problem, match="damaged"):
        download(liar.client, "ftjob-1", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tar_that_leaves_its_folder_is_refused(liar: Liar, tmp_path: Path) -> None:
    liar.tar = tar(**{"../../escaped": b"x"})
    with pytest.raises(tarfile.OutsideDestinationError):
        download(liar.client, "ftjob-1", tmp_path / "in" / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["in"]
