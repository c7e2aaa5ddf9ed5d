"""A store or a database that hangs: no session is open meanwhile, the answer is a 503 in time, and a thaw is enough."""

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx2
import obstore
import pytest
from sqlalchemy.exc import InternalError, OperationalError
from sqlalchemy.pool import QueuePool

from api.core.access import keys
from api.core.db import database, migrate
from api.core.files import files, storage
from api.core.files.storage import CHUNK, BreakerStorage, Storage, StorageSilent, get_storage, make_storage
from api.core.resilience.breaker import PROBE_SECONDS, SILENCE_SECONDS, Breaker
from api.core.settings import Settings, get_settings
from api.routes import health
from tests import servers, stub_worker
from tests.api.conftest import JOBS, JSONL, Lab, a_lab, refused
from tests.promises import within
from tests.things import MODEL

IN_TIME = 5.0  # on an idle machine

EXPERIMENTS = "/v1/experiments"


# --- no session is open while storage reads or writes ------------------------------------------------


@dataclass
class Watch:
    """What storage was asked for, and what of it with a connection of the database in somebody's hands."""

    calls: list[str]
    faults: list[str]


@pytest.fixture
def watch(service: None, monkeypatch: pytest.MonkeyPatch) -> Watch:
    found = Watch([], [])
    monkeypatch.setattr(health, "DATABASE_SECONDS", 3600.0)  # /readyz looks at both at once, each by itself
    health.forget()
    assert health._database().works()

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any, **more: Any) -> Any:
            found.calls.append(name)
            taken = [
                cast(QueuePool, engine.pool).checkedout() for engine in {database.get_engine(), database.get_reader()}
            ]
            if any(taken):
                found.faults.append(f"{name} {arguments[1]}")
            return call(*arguments, **more)

        return checked

    for name in ("put", "head", "get_range", "delete"):
        monkeypatch.setattr(obstore, name, watched(name, getattr(obstore, name)))
    return found


def everything(lab: Lab) -> Iterator[tuple[str, str]]:
    """Every route, asked for something that is there; in an order that deletes last."""
    file, job = lab.upload()["id"], lab.order()["id"]
    held = lab.order(metadata={"stub": "hold"})["id"]
    stub_worker.run_all()
    done = lab.client.get(f"{JOBS}/{job}").json()
    own = f"/v1/organization/projects/{lab.project.id}/api_keys"
    key = lab.client.post(own, json={"name": "another"}).json()["id"]
    yield from [("POST", "/v1/files"), ("GET", "/v1/files"), ("GET", f"/v1/files/{file}")]
    yield from [(verb, f"/v1/files/{file}/content") for verb in ("GET", "HEAD")]
    yield from [("GET", f"/v1/files/{done['result_files'][0]}/content"), ("POST", JOBS), ("GET", JOBS)]
    yield from [("GET", f"{JOBS}/{job}{rest}") for rest in ("", "/events", "/events/stream", "/checkpoints")]
    yield from [(verb, f"{JOBS}/{job}/adapter") for verb in ("GET", "HEAD")]
    yield from [("POST", f"{JOBS}/{held}/{verb}") for verb in ("pause", "cancel")]
    paused = lab.order()["id"]
    yield from [("POST", f"{JOBS}/{paused}/{verb}") for verb in ("pause", "resume")]
    compared = lab.client.post(EXPERIMENTS, json=an_experiment(lab)).json()["id"]
    yield from [("POST", EXPERIMENTS), ("GET", EXPERIMENTS)]
    yield from [("GET", f"{EXPERIMENTS}/{compared}{rest}") for rest in ("", "/report")]
    yield from [("POST", f"{EXPERIMENTS}/{compared}/cancel"), ("DELETE", f"{EXPERIMENTS}/{compared}")]
    yield from [("GET", "/v1/models"), ("GET", f"/v1/models/{MODEL}"), ("GET", "/v1/lora/methods")]
    yield from [("GET", "/v1/lora/methods/pissa"), ("POST", own), ("GET", own), ("GET", f"{own}/{key}")]
    yield from [("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics")]
    yield from [("DELETE", f"/v1/models/{done['fine_tuned_model']}"), ("DELETE", f"/v1/files/{file}")]
    yield ("DELETE", f"{own}/{key}")


def an_experiment(lab: Lab) -> dict[str, Any]:
    job = {"model": MODEL, "training_file": lab.upload()["id"], "validation_file": lab.upload(JSONL * 2)["id"]}
    grid = {"init": ["kaiming"], "learning_rates": [1e-4], "seeds": [1]}
    return {"name": "compared", "job": job, "grid": grid}


def ask(lab: Lab, verb: str, path: str) -> Any:
    if (verb, path) == ("POST", "/v1/files"):
        # The second is a repetition: its bytes are removed again.
        lab.client.post(path, files={"file": ("a.jsonl", JSONL)}, data={"purpose": "evals"})
        again = {"x-stainless-retry-count": "1"}
        return lab.client.post(path, files={"file": ("a.jsonl", JSONL)}, data={"purpose": "evals"}, headers=again)
    body = {JOBS: {"model": MODEL, "training_file": ""}}.get(path) if verb == "POST" else None
    if body is not None:
        body["training_file"] = lab.upload()["id"]
    if (verb, path) == ("POST", EXPERIMENTS):
        body = an_experiment(lab)
    if verb == "POST" and path.endswith("/api_keys"):
        body = {"name": "one more"}
    return lab.client.request(verb, path, json=body)


def test_no_route_holds_a_session_while_storage_reads_or_writes(watch: Watch) -> None:
    lab = a_lab("admin")
    table = lab.client.app.state.table  # type: ignore[attr-defined]
    asked: set[tuple[str, str]] = set()
    for verb, path in everything(lab):
        reply = ask(lab, verb, path)
        assert reply.status_code in (200, 401), (verb, path, reply.text)  # 401: /metrics is for this host alone
        asked |= {(verb, route.path) for route in table.routes if route.matches(_scope(verb, path))[0].name == "FULL"}
    assert watch.faults == []
    assert {(verb, route.path) for route in table.routes for verb in route.methods} <= asked, "a route of no test"
    assert set(watch.calls) == {"put", "head", "get_range", "delete"}, "storage was not asked for anything"


def test_an_upload_that_cannot_be_counted_is_removed_without_a_session(
    watch: Watch, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("LORAINIT_PROJECT_FILES", "1")
    get_settings.cache_clear()
    lab = a_lab()
    lab.upload()
    reply = lab.client.post("/v1/files", files={"file": ("b.jsonl", JSONL)}, data={"purpose": "evals"},
                            headers={"x-stainless-retry-count": "1"})  # fmt: skip
    refused(reply, 429, "quota_exceeded", "file")
    assert ("delete" in watch.calls, watch.faults) == (True, [])


def _scope(verb: str, path: str) -> dict[str, Any]:
    return {"type": "http", "path": path, "root_path": "", "method": verb}


# --- a store that hangs ---------------------------------------------------------------------------------


class Frozen:
    """A store that answers while it is not frozen, and a clock by which every look at it takes a second."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self.thawed, self.time = storage, threading.Event(), 0.0
        self.thawed.set()
        self.breaker = Breaker("storage", self.look, clock=self.clock, pause=lambda _: self.thawed.wait(60))

    def clock(self) -> float:
        self.time += 0.0 if self.thawed.is_set() else 1.0
        return self.time

    def look(self) -> None:
        self.thawed.wait(60)

    def __getattr__(self, name: str) -> Any:
        assert self.thawed.wait(60)
        return getattr(self._storage, name)


class Hanging:
    """Storage whose calls begin and do not end."""

    def __init__(self, frozen: Frozen) -> None:
        self._frozen = frozen

    def put(self, key: str, source: Any) -> None:
        self._frozen.put(key, source)

    def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        for chunk in self._frozen.read(key, start=start, end=end):
            assert self._frozen.thawed.wait(60)
            yield chunk

    def delete(self, key: str) -> None:
        self._frozen.delete(key)

    def probe(self) -> None:
        self._frozen.probe()


@pytest.fixture
def frozen(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Frozen]:
    made = Frozen(make_storage((tmp_path / "storage").as_uri(), Settings()))
    answering = BreakerStorage(cast(Storage, Hanging(made)), made.breaker)
    monkeypatch.setattr(storage, "make_storage", lambda *_: answering)
    get_storage.cache_clear()
    yield made
    made.thawed.set()


def unavailable(reply: Any) -> None:
    assert refused(reply, 503, "not_ready")["type"] == "server_error"
    assert 1 <= int(reply.headers["retry-after"]) <= 10


def test_a_frozen_store_is_a_503_where_it_is_needed_and_nothing_elsewhere(lab: Lab, frozen: Frozen) -> None:
    file = lab.upload()["id"]
    frozen.thawed.clear()
    for _ in range(3):
        unavailable(lab.client.get(f"/v1/files/{file}/content"))
    unavailable(lab.client.post("/v1/files", files={"file": ("b.jsonl", JSONL)}, data={"purpose": "evals"}))
    assert lab.client.head(f"/v1/files/{file}/content").status_code == 200
    assert lab.client.get("/v1/files").status_code == 200
    assert lab.client.delete(f"/v1/files/{file}").status_code == 200, "its bytes go later"


@pytest.mark.parametrize(
    "error",
    [
        InternalError("SELECT 1", {}, Exception("idle-in-transaction timeout"), connection_invalidated=True),
        OperationalError("SELECT 1", {}, Exception("the database is silent")),
        StorageSilent(),
    ],
    ids=["a session that was ended", "a silent database", "a silent store"],
)
def test_what_passes_is_a_503(lab: Lab, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(files, "list_page", fail)
    unavailable(lab.client.get("/v1/files"))


def test_another_error_inside_the_database_is_a_500(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise InternalError("SELECT 1", {}, Exception("a bug"))

    monkeypatch.setattr(files, "list_page", fail)
    refused(lab.client.get("/v1/files"), 500, "internal_error")


def test_a_thawed_store_is_used_again_without_a_restart(lab: Lab, frozen: Frozen) -> None:
    file = lab.upload()["id"]
    frozen.thawed.clear()
    unavailable(lab.client.get(f"/v1/files/{file}/content"))
    frozen.thawed.set()
    until(lambda: not frozen.breaker.is_open)
    assert lab.client.get(f"/v1/files/{file}/content").content == JSONL


def test_a_download_whose_store_freezes_in_the_middle_is_let_go(tmp_path: Path) -> None:
    frozen = Frozen(make_storage((tmp_path / "storage").as_uri(), Settings()))
    answering = BreakerStorage(cast(Storage, Hanging(frozen)), frozen.breaker)
    answering.put("large", iter([bytes(8 * CHUNK), b"the rest"]))
    chunks = answering.read("large")
    assert len(next(chunks)) == 8 * CHUNK
    frozen.thawed.clear()
    with pytest.raises(StorageSilent):
        next(chunks)
    frozen.thawed.set()


def until(what: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


# --- real servers that are stopped with SIGSTOP ------------------------------------------------------------


@dataclass
class Answer:
    status: int
    seconds: float
    reply: httpx2.Response


@dataclass
class Service:
    """A web process of its own, with its own servers."""

    client: httpx2.Client

    def ask(self, verb: str, path: str, **body: Any) -> Answer:
        began = time.monotonic()
        reply = self.client.request(verb, path, **body)
        return Answer(reply.status_code, time.monotonic() - began, reply)

    def at_once(self, *requests: tuple[str, str], times: int = 1) -> list[Answer]:
        with ThreadPoolExecutor(len(requests) * times) as pool:
            return list(pool.map(lambda request: self.ask(*request), requests * times))

    def upload(self) -> str:
        files = {"file": ("a.jsonl", JSONL)}
        answer = self.ask("POST", "/v1/files", files=files, data={"purpose": "evals"})
        assert answer.status == 200, answer.reply.text
        return str(answer.reply.json()["id"])


def client_of(address: str, secret: str) -> httpx2.Client:
    limits, bearer = httpx2.Limits(max_connections=200), {"authorization": f"Bearer {secret}"}
    return httpx2.Client(base_url=address, headers=bearer, timeout=60, limits=limits)


@pytest.mark.slow
def test_a_frozen_postgresql_is_a_503_in_time_and_its_thaw_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with servers.folder() as place:
        server = servers.Postgres(place)
        try:
            url = server.url
            engine = database.make_engine(url)
            migrate.upgrade(engine)
            with database.Session(engine) as session:
                project = keys.get_or_create_project(session, "lab")
                _, secret = keys.create_key(session, project, name="test")
                session.commit()
            engine.dispose()
            settings = {"LORAINIT_STATE_DIR": str(tmp_path), "LORAINIT_DATABASE_URL": url}
            with servers.web(settings, log=tmp_path / "web.log") as address, client_of(address, secret) as client:
                _freeze_and_thaw(Service(client), server)
        finally:
            server.stop()


def _freeze_and_thaw(service: Service, server: servers.Postgres) -> None:
    file = service.upload()
    routes = [("GET", "/v1/models"), ("GET", JOBS), ("GET", f"/v1/files/{file}/content"), ("GET", "/v1/files")]
    assert {answer.status for answer in service.at_once(*routes, times=5)} == {200}
    thaw = servers.freeze(server.process)
    try:
        # More requests than threads: those that wait for a thread are in time, too.
        with ThreadPoolExecutor(2) as pool:
            health_checks = pool.submit(service.at_once, ("GET", "/healthz"), ("GET", "/readyz"), times=3)
            answers = service.at_once(*routes, times=20)
        assert {answer.status for answer in answers} == {503}
        assert {answer.reply.json()["error"]["code"] for answer in answers} == {"not_ready"}
        assert all(1 <= int(answer.reply.headers["retry-after"]) <= 10 for answer in answers)
        assert max(answer.seconds for answer in answers) < within(IN_TIME)
        assert max(answer.seconds for answer in health_checks.result()) < within(IN_TIME)
        assert all(answer.status == 200 for answer in health_checks.result()[::2])
        assert service.ask("GET", "/readyz").status == 503
        again = service.at_once(*routes, times=20)
        assert {answer.status for answer in again} == {503}
        usual = statistics.median(answer.seconds for answer in again)
        assert usual < SILENCE_SECONDS + PROBE_SECONDS, "refused at once"
    finally:
        thaw()
    until(lambda: service.ask("GET", "/readyz").status == 200, seconds=120)
    assert {answer.status for answer in service.at_once(*routes, times=5)} == {200}


@pytest.mark.slow
def test_a_frozen_bucket_is_a_503_in_time_and_its_thaw_is_enough(
    service: None, tmp_path: Path, database_url: str
) -> None:
    secret = a_lab().client.headers["authorization"].removeprefix("Bearer ")
    with servers.seaweed_process() as (bucket, process):
        settings = {"LORAINIT_STATE_DIR": str(tmp_path), "LORAINIT_DATABASE_URL": database_url, **bucket}
        with servers.web(settings, log=tmp_path / "web.log") as address, client_of(address, secret) as client:
            _freeze_and_thaw_the_bucket(Service(client), process)


def _freeze_and_thaw_the_bucket(service: Service, process: Any) -> None:
    file = service.upload()
    content, others = ("GET", f"/v1/files/{file}/content"), [("GET", "/v1/models"), ("GET", JOBS), ("GET", "/healthz")]
    assert service.ask(*content).reply.content == JSONL
    thaw = servers.freeze(process)
    try:
        with ThreadPoolExecutor(1) as pool:
            downloads = pool.submit(service.at_once, content, times=60)  # more than there are threads for any work
            beside = service.at_once(*others, times=5)
        assert {answer.status for answer in beside} == {200}
        assert {answer.status for answer in downloads.result()} == {503}
        assert max(answer.seconds for answer in downloads.result()) < within(IN_TIME)
        files = {"file": ("a.jsonl", JSONL)}
        upload = service.ask("POST", "/v1/files", files=files, data={"purpose": "evals"})
        assert (upload.status, upload.seconds < within(IN_TIME)) == (503, True)
        assert service.ask("GET", "/readyz").seconds < within(IN_TIME)
    finally:
        thaw()
    until(lambda: service.ask(*content).status == 200, seconds=120)
    until(lambda: service.ask("GET", "/readyz").status == 200, seconds=120)
    service.upload()
