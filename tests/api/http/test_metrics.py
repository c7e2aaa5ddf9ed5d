"""GET /metrics: what Prometheus reads, who may read it, and that nothing else depends on it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from api.core.db.tables import FINAL_STATUSES
from api.core.jobs import jobs
from api.core.jobs.jobs import Failure
from api.core.monitoring import counters
from api.core.settings import get_settings
from api.http import exposition
from tests.api.conftest import Lab, refused
from tests.deploy.test_troubleshooting import job_codes
from tests.things import a_project, a_queued_job, a_running_job, a_worker

ROOT = Path(__file__).parents[3]


@pytest.fixture
def local(app: Any) -> TestClient:
    return TestClient(app, client=("127.0.0.1", 5000), raise_server_exceptions=False)


def scrape(local: TestClient) -> dict[str, float]:
    """Value by `name{labels}`."""
    reply = local.get("/metrics")
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == exposition.CONTENT_TYPE
    lines = [line.rpartition(" ") for line in reply.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_open_jobs_are_shown_by_status_with_the_oldest_wait(session: Session, local: TestClient) -> None:
    project = a_project(session)
    a_running_job(session, project)
    a_queued_job(session, project)
    session.commit()
    shown = scrape(local)
    assert shown['lorainit_jobs{status="running"}'] == shown['lorainit_jobs{status="queued"}'] == 1
    assert shown['lorainit_jobs{status="validating_files"}'] == 0
    assert shown["lorainit_queue_unannounced"] == 1
    assert 0 <= shown["lorainit_queue_oldest_wait_seconds"] < 60


def test_an_ended_job_counts_by_method_with_its_seconds_by_stage(session: Session, local: TestClient) -> None:
    _, lease = a_running_job(session, a_project(session))
    jobs.update_run(session, lease, progress={"stage_seconds": {"loading": 2.5, "training": 10.0}})
    jobs.fail(session, lease, Failure("out_of_memory", "Too little memory."))
    session.commit()
    shown = scrape(local)
    assert shown['lorainit_jobs_finished_total{code="out_of_memory",method="kaiming",status="failed"}'] == 1
    assert shown['lorainit_stage_seconds_total{method="kaiming",stage="training"}'] == 10
    assert shown['lorainit_out_of_memory_total{outcome="failed"}'] == 1


def test_a_write_without_the_lease_counts_nothing(session: Session, local: TestClient) -> None:
    job, lease = a_running_job(session, a_project(session))
    jobs.cancel(session, job)
    assert not jobs.fail(session, lease, Failure("internal_error", "Too late."))
    session.commit()
    ended = {name: value for name, value in scrape(local).items() if name.startswith("lorainit_jobs_finished_total")}
    assert ended == {'lorainit_jobs_finished_total{code="",method="kaiming",status="cancelled"}': 1}


def test_the_speed_of_running_jobs_is_added_up(session: Session, local: TestClient) -> None:
    project = a_project(session)
    for speed in (100.0, 50.0):
        _, lease = a_running_job(session, project)
        jobs.update_run(session, lease, progress={"tokens_per_second": speed})
    session.commit()
    assert scrape(local)['lorainit_training_tokens_per_second{method="kaiming"}'] == 150


def test_counts_with_equal_labels_add_up(session: Session) -> None:
    for _ in range(3):
        counters.add(session, "leases_lost")
    counters.add(session, "objects_removed", 2, reason="orphan")
    counters.add(session, "objects_removed", 0, reason="expired")
    assert [(count.name, dict(count.labels), count.value) for count in counters.read(session)] == [
        ("leases_lost", {}, 3),
        ("objects_removed", {"reason": "orphan"}, 2),
    ]


def test_requests_are_counted_by_route_and_status(lab: Lab, local: TestClient) -> None:
    lab.client.get("/v1/files/file-x")
    lab.client.get("/v1/files/file-y")
    lab.client.request("BREW", "/tea")
    shown = scrape(local)
    name = "lorainit_http_request_duration_seconds"
    assert shown[name + '_count{method="GET",route="/v1/files/{file_id}",status="404"}'] == 2
    assert shown[name + '_count{method="other",route="none",status="404"}'] == 1


def test_parts_that_are_away_show_as_0(session: Session, local: TestClient) -> None:
    shown = scrape(local)
    assert [shown[f'lorainit_up{{part="{part}"}}'] for part in ("database", "storage", "broker")] == [1, 1, 0]


def test_without_a_database_the_rest_is_still_shown(local: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(**_: Any) -> None:
        raise OSError("no database")

    monkeypatch.setattr(exposition, "session_scope", down)
    shown = scrape(local)
    assert shown['lorainit_up{part="database"}'] == 0
    assert shown['lorainit_volume_free_bytes{volume="storage"}'] > 0
    assert "lorainit_queue_oldest_wait_seconds" not in shown


def test_another_host_reads_no_metrics(lab: Lab) -> None:
    refused(lab.client.get("/metrics"), 401, "invalid_api_key")


def test_a_local_proxy_does_not_open_them_to_its_callers(local: TestClient) -> None:
    refused(local.get("/metrics", headers={"x-forwarded-for": "192.0.2.1"}), 401, "invalid_api_key")


def test_with_a_token_that_token_is_needed(
    session: Session, app: Any, local: TestClient, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("LORAINIT_METRICS_TOKEN", "s3cret")
    get_settings.cache_clear()
    remote = TestClient(app)
    assert remote.get("/metrics", headers={"authorization": "Bearer s3cret"}).status_code == 200
    refused(remote.get("/metrics", headers={"authorization": "Bearer other"}), 401, "invalid_api_key")
    refused(local.get("/metrics"), 401, "invalid_api_key")


def everything_shown(session: Session, local: TestClient) -> dict[str, set[str]]:
    """Every metric there is, with its labels."""
    a_worker(session)
    a_running_job(session, a_project(session))
    for name, (_, labels) in exposition.COUNTERS.items():
        counters.add(session, name, 1, **dict.fromkeys(labels, "x"))
    session.commit()
    local.get("/healthz")
    return {name.partition("{")[0]: set(re.findall(r'(\w+)="', name)) for name in scrape(local)}


def assert_shown(queries: list[str], shown: dict[str, set[str]]) -> None:
    """Every metric and label that a query names is there."""
    for query in queries:
        named = re.findall(r"\b(lorainit_\w+)(\{[^}]*\})?", query)
        assert named, query
        for name, selector in named:
            assert name in shown, query
            assert set(re.findall(r"(\w+)\s*(?:=|!=|=~|!~)\s*\"", selector)) <= shown[name], query


def test_every_query_of_the_dashboard_names_a_metric_that_is_shown(session: Session, local: TestClient) -> None:
    queries = list(_queries(json.loads((ROOT / "docs" / "operations" / "grafana.json").read_text())))
    assert len(queries) > 10
    assert_shown(queries, everything_shown(session, local))


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((ROOT / "docs" / "operations" / "alerts.yml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def test_every_alert_names_a_metric_that_is_shown(session: Session, local: TestClient) -> None:
    assert_shown([rule["expr"] for rule in alerts()], everything_shown(session, local))


def test_every_alert_groups_by_and_shows_labels_that_its_metrics_have(session: Session, local: TestClient) -> None:
    shown = everything_shown(session, local)
    for rule in alerts():
        labels = set.union(*(shown[name] for name in re.findall(r"\blorainit_\w+", rule["expr"])))
        grouped = {name.strip() for names in re.findall(r"by \(([^)]*)\)", rule["expr"]) for name in names.split(",")}
        assert grouped <= labels, rule["alert"]
        kept = grouped or (set() if re.search(r"\b(max|min|sum)\(", rule["expr"]) else labels)
        assert set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))) <= kept, rule["alert"]


def test_every_code_and_status_that_an_alert_waits_for_is_one_that_a_job_can_end_with() -> None:
    (expression,) = (rule["expr"] for rule in alerts() if rule["alert"] == "LorainitJobsFail")
    (codes,) = re.findall(r'code=~"([^"]*)"', expression)
    assert set(codes.split("|")) <= job_codes()
    assert set(re.findall(r'status="([^"]*)"', expression)) <= set(FINAL_STATUSES)


def test_every_alert_says_what_is_wrong_and_what_to_look_at() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["annotations"]["description"].endswith((".", "`"))


def _queries(part: Any) -> Any:
    if isinstance(part, dict):
        yield from [part["expr"]] if "expr" in part else []
        for inner in part.values():
            yield from _queries(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _queries(inner)
