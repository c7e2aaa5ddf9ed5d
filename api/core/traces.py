"""OpenTelemetry traces from a request to the run of its job, if an exporter is configured.

Configured by OpenTelemetry's own variables (`OTEL_EXPORTER_OTLP_ENDPOINT` and so on) and the extra
`otel`. Without them nothing of it is imported. The job's row carries the trace, so that any worker
can continue it, even days later.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from api.core.singleton import singleton

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

FLUSH_MILLISECONDS = 2000  # short, because a slot takes no job while it waits for the exporter
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def is_configured() -> bool:
    """An address for traces is set, and tracing is not switched off."""
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    return not off and any(os.environ.get(name) for name in _ENDPOINTS)


@singleton
def get_provider() -> "TracerProvider | None":
    """This process's provider of spans; None if no exporter is configured.

    A worker calls it after the fork, because the exporter has a thread, which a fork does not copy.

    Raises:
        ImportError: traces are configured and the extra `otel` is not installed.
    """
    if not is_configured():
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    made = TracerProvider()
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return made


def find_traceparent() -> str | None:
    """The `traceparent` of the request being answered; None without one."""
    if get_provider() is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


@contextmanager
def span(name: str, parent: str | None, **attributes: str | int) -> Iterator[None]:
    """A span below `parent` for the length of the block, sent at its end; nothing if no exporter is configured."""
    listening = get_provider()
    if listening is None:
        yield
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({"traceparent": parent} if parent else {})
    try:
        with listening.get_tracer("lorainit").start_as_current_span(name, context, attributes=dict(attributes)):
            yield
    finally:
        listening.force_flush(FLUSH_MILLISECONDS)
