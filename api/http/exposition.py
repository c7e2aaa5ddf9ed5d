"""Everything that `GET /metrics` shows, in Prometheus' format.

There are two sources. Requests are counted in this process, as Prometheus expects of each that it scrapes. All else is
read from the database when it is asked for, so that workers need no port of their own and counts survive
restarts. All API processes show the same figures of that kind: take their `max`, not their `sum`.
"""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.core.db.database import session_scope
from api.core.files import disk
from api.core.logs import get_logger
from api.core.monitoring import gauges
from api.core.monitoring.gauges import Snapshot
from api.core.settings import get_settings

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
VERBS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# Names in the table of counters: what they mean, and their labels.
COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "jobs_finished": ("Jobs that ended.", ("method", "status", "code")),
    "stage_seconds": ("Seconds the last attempts of ended jobs spent in each stage.", ("method", "stage")),
    "trained_tokens": ("Tokens that succeeded jobs trained on.", ("method",)),
    "out_of_memory": ("Runs out of memory: the job failed, or went on with smaller batches.", ("outcome",)),
    "leases_lost": ("Running jobs taken back from a silent worker.", ()),
    "objects_removed": ("Files, checkpoints, jobs and orphans removed by retention.", ("reason",)),
}


class Requests:
    """The requests this process answered."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "lorainit_http_request_duration_seconds",
            "Seconds until an answer was sent completely.",
            ("method", "route", "status"),
            registry=registry,
            buckets=LATENCIES,
        )

    def observe(self, method: str, route: str | None, status: int | None, seconds: float) -> None:
        """Count one. Unknown paths and methods share a label, because anybody could send millions of different ones."""
        verb = method if method in VERBS else "other"
        self._seconds.labels(verb, route or "none", str(status or 499)).observe(seconds)


class Service(Collector):
    """The state of the whole service when it is collected. A part that does not answer is shown as down."""

    def __init__(self, parts: Mapping[str, Callable[[], bool]]) -> None:
        self._parts = parts

    def describe(self) -> list[Metric]:
        """Nothing, so that the database is not read when the application is made."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics, read now."""
        up = GaugeMetricFamily("lorainit_up", "1 when this part answers.", labels=("part",))
        snapshot = _take_snapshot()
        up.add_metric(("database",), float(snapshot is not None))
        for name, works in self._parts.items():
            up.add_metric((name,), float(works()))
        yield up
        yield from _volumes()
        if snapshot is not None:
            yield from _figures(snapshot)
            yield from _counts(snapshot)


def make_registry(parts: Mapping[str, Callable[[], bool]]) -> CollectorRegistry:
    """A registry of this application's own, because tests make several. Nothing is read yet."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Service(parts))
    return registry


def _take_snapshot() -> Snapshot | None:
    try:
        with session_scope(read_only=True) as session:
            return gauges.take_snapshot(session)
    except Exception as error:  # any, because a scrape must show that the database is down
        get_logger(__name__).warning("database_unavailable", error=str(error))
        return None


def _figures(snapshot: Snapshot) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("lorainit_jobs", "Jobs that have not ended.", labels=("status",))
    for status, count in snapshot.jobs.items():
        jobs.add_metric((status,), count)
    speeds = GaugeMetricFamily(
        "lorainit_training_tokens_per_second", "Trained tokens per second of running jobs.", labels=("method",)
    )
    for method, speed in snapshot.speeds.items():
        speeds.add_metric((method,), speed)
    wait = "Seconds since the oldest queued job was created; 0 when none is queued."
    return iter(
        [
            jobs,
            speeds,
            GaugeMetricFamily("lorainit_queue_oldest_wait_seconds", wait, value=snapshot.oldest_wait),
            GaugeMetricFamily(
                "lorainit_queue_unannounced",
                "Queued jobs that workers were not notified of yet.",
                value=snapshot.unannounced,
            ),
            GaugeMetricFamily("lorainit_workers", "Workers heard of lately.", value=snapshot.workers),
            GaugeMetricFamily("lorainit_worker_slots", "Runs these workers can hold at once.", value=snapshot.slots),
        ]
    )


def _counts(snapshot: Snapshot) -> Iterator[Metric]:
    for name, (text, labels) in COUNTERS.items():
        family = CounterMetricFamily(f"lorainit_{name}", text, labels=labels)
        for count in snapshot.counters:
            if count.name == name:
                family.add_metric([count.labels[label] for label in labels], count.value)
        if not labels and not family.samples:
            family.add_metric((), 0)
        yield family


def _volumes() -> Iterator[Metric]:
    free = GaugeMetricFamily("lorainit_volume_free_bytes", "Free on a disk of this host.", labels=("volume",))
    size = GaugeMetricFamily("lorainit_volume_size_bytes", "Size of a disk of this host.", labels=("volume",))
    for volume in disk.list_service_volumes(get_settings()):
        free.add_metric((volume.name,), volume.free)
        size.add_metric((volume.name,), volume.size)
    return iter([free, size])
