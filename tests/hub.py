"""A model hub on loopback: the routes that huggingface_hub asks for one model, and what it answers when it will not.

`python -m tests.hub FOLDER` serves the folders in FOLDER/OWNER/NAME until it is interrupted.
"""

import hashlib
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_token_of_somebody_who_may"


@dataclass(frozen=True)
class Repository:
    """A model: its files by revision, "main" among them, and who may have it; or the `status` that all get."""

    revisions: Mapping[str, Path]
    private: bool = False
    gated: bool = False
    status: int = 200

    def folder(self, revision: str) -> Path | None:
        """The files of a branch, a tag or a commit."""
        by_commit = {commit(folder): folder for folder in self.revisions.values()}
        return self.revisions.get(revision) or by_commit.get(revision)


def commit(folder: Path) -> str:
    """Forty hexadecimal digits for what a folder holds."""
    digest = hashlib.sha1(usedforsecurity=False)
    for file in _files(folder):
        digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@dataclass
class Hub:
    """A running hub: its address, and every request for a model as `VERB path`."""

    url: str
    asked: list[str] = field(default_factory=list)


@contextmanager
def serving(models: Mapping[str, Repository], *, port: int = 0) -> Iterator[Hub]:
    """Serve the models by their ids."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if {"/".join(parts[:2]), "/".join(parts[2:4])} & set(models):  # the client asks for its own ends, too
                asked.append(f"{self.command} {self.path}")
            if parts[:2] == ["api", "models"]:
                self._describe("/".join(parts[2:4]), parts[4:])
            elif parts[2:3] == ["resolve"]:
                self._send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self._refuse(404, "")

        do_HEAD = do_GET  # noqa: N815  (the name that the server looks for)

        def log_message(self, *_: object) -> None: ...

        def _describe(self, name: str, rest: list[str]) -> None:
            revision = rest[1] if len(rest) > 1 else "main"
            if (folder := self._allowed(name, revision)) is None:
                return
            if rest[:1] == ["tree"]:
                self._json([_entry(file, folder) for file in _files(folder)])
            else:
                self._json({"id": name, "sha": commit(folder), "siblings": []})

        def _send_file(self, name: str, revision: str, file: str) -> None:
            if (folder := self._allowed(name, revision)) is None:
                return
            if not (folder / file).is_file():
                self._refuse(404, "EntryNotFound")
                return
            content = (folder / file).read_bytes()
            self._answer(content, {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": commit(folder)})

        def _allowed(self, name: str, revision: str) -> Path | None:
            """The folder that is asked for; None after a refusal."""
            model, known = models.get(name), self.headers.get("authorization") == f"Bearer {TOKEN}"
            if model is not None and model.status != 200:
                self._refuse(model.status, "")
            elif model is None or (model.private and not known):
                self._refuse(404 if known else 401, "RepoNotFound")
            elif model.gated and not known:
                self._refuse(403, "GatedRepo")
            elif (folder := model.folder(revision)) is None:
                self._refuse(404, "RevisionNotFound")
            else:
                return folder
            return None

        def _json(self, value: object) -> None:
            self._answer(json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _answer(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
            self.send_response(status)
            for key, text in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, text)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def _refuse(self, status: int, code: str) -> None:
            self._answer(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, status)

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_address[1]}", asked)
    finally:
        server.shutdown()
        server.server_close()


def _entry(file: Path, folder: Path) -> dict[str, object]:
    content = file.read_bytes()
    return {"type": "file", "path": str(file.relative_to(folder)), "size": len(content), "oid": _blob(content)}


def _blob(content: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def main() -> None:
    """Serve a folder of folders."""
    top = Path(sys.argv[1])
    models = {str(folder.relative_to(top)): Repository({"main": folder}) for folder in top.glob("*/*")}
    with serving(models, port=int(sys.argv[2]) if len(sys.argv) > 2 else 0) as hub:
        print(f"HF_ENDPOINT={hub.url} offers {', '.join(models)}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
