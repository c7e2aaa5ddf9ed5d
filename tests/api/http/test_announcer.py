"""A broker that is silent costs one waiting, not one a job; the reconciler notifies meanwhile."""

from typing import Any

import anyio
import pytest

from api.core.jobs import admission
from api.core.queue import notify, queue
from api.http import announcer
from api.http.announcer import JobAnnouncer


def test_after_a_failure_the_broker_is_left_alone_for_a_while(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    notified: list[str] = []

    def silent(job_id: str, _name: str) -> None:
        notified.append(job_id)
        raise queue.BrokerUnavailable("no answer")

    monkeypatch.setattr(queue, "notify_workers", silent)
    monkeypatch.setattr(admission, "consider", lambda *_: None)
    monkeypatch.setattr(notify, "find_notification", lambda _session, job_id: notify.Notification(job_id, "train"))
    time = 100.0
    ours = JobAnnouncer(clock=lambda: time)
    for job in ("one", "two", "three"):
        anyio.run(ours.announce, job)
    assert notified == ["one"]
    time += announcer.PAUSE_SECONDS
    anyio.run(ours.announce, "four")
    assert notified == ["one", "four"]
