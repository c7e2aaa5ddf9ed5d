"""One trace from a request to the run it ordered; nothing at all when nobody listens."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy.orm import Session

from api.app import create_app
from api.core import traces
from api.core.db.tables import Job
from tests.api.conftest import Lab, make_lab

TRACE = "0af7651916cd43dd8448eb211c80319c"
INCOMING = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    fixed: Any = lambda: provider  # noqa: E731
    fixed.cache_clear = lambda: None
    monkeypatch.setattr(traces, "get_provider", fixed)
    return exporter


def order(session: Session, **headers: str) -> Job:
    lab: Lab = make_lab(session, create_app(), "traced")
    lab.client.headers.update(headers)
    return session.get_one(Job, lab.order()["id"])


def named(found: Sequence[ReadableSpan], name: str) -> ReadableSpan:
    return next(span for span in found if span.name == name)


def test_the_run_is_in_the_trace_of_the_request_that_ordered_it(session: Session, spans: InMemorySpanExporter) -> None:
    job = order(session, **INCOMING)
    with traces.span("run", job.traceparent, job=job.id, attempt=1):
        pass
    run = named(spans.get_finished_spans(), "run")
    assert run.context.trace_id == int(TRACE, 16)
    assert dict(run.attributes or {}) == {"job": job.id, "attempt": 1}
    requests = [span for span in spans.get_finished_spans() if "/v1/fine_tuning/jobs" in span.name]
    assert run.parent is not None
    assert run.parent.span_id in {span.context.span_id for span in spans.get_finished_spans()}
    assert {span.context.trace_id for span in requests} == {int(TRACE, 16)}


def test_a_run_that_raises_is_an_error_in_its_trace(spans: InMemorySpanExporter) -> None:
    with pytest.raises(RuntimeError), traces.span("run", None):
        raise RuntimeError("worker trouble")
    (run,) = spans.get_finished_spans()
    assert not run.status.is_ok


def test_without_a_listener_a_job_has_no_trace(session: Session) -> None:
    assert order(session, **INCOMING).traceparent is None


def test_without_a_listener_nothing_that_traces_is_loaded() -> None:
    # redis-py loads what counts, `opentelemetry.sdk.metrics`, wherever the SDK is installed
    code = (
        "import sys; import worker.tasks; from api.app import create_app; from api.core import traces; create_app()\n"
        "with traces.span('run', None): pass\n"
        "parts = ('opentelemetry.sdk.trace', 'opentelemetry.exporter')\n"
        "print([name for name in sys.modules if name.startswith(parts)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_opentelemetrys_own_variables_decide(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool
) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert traces.is_configured() is expected
