"""Counters that survive restarts. They are written in the transaction of what they count, so that a fenced
write counts nothing and no count is lost. `/metrics` reads them; a scrape reads one small table.

They are written last in a transaction and in sorted order, so that two transactions never wait for each other.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from api.core.db.tables import FINAL_STATUSES, Counter, Job


class CounterValue(NamedTuple):
    """One row: a name, its labels, how much."""

    name: str
    labels: Mapping[str, str]
    value: float


def add(session: Session, name: str, value: float = 1.0, **labels: str) -> None:
    """Add to one count; nothing is written for 0."""
    add_all(session, [CounterValue(name, labels, value)])


def add_all(session: Session, counts: list[CounterValue]) -> None:
    """Add to several counts; equal names and labels may come once only."""
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    rows = [(count.name, json.dumps(dict(count.labels), sort_keys=True), count.value) for count in counts]
    for name, labels, value in sorted(rows):
        if value:
            statement = dialect.insert(Counter).values(name=name, labels=labels, value=value)
            more = {"value": Counter.value + statement.excluded.value}
            session.execute(statement.on_conflict_do_update(index_elements=["name", "labels"], set_=more))


def read(session: Session) -> list[CounterValue]:
    """Every count."""
    rows = session.execute(select(Counter.name, Counter.labels, Counter.value).order_by(Counter.name, Counter.labels))
    return [CounterValue(name, json.loads(labels), value) for name, labels, value in rows]


def count_ended_job(session: Session, job_id: str, *, status: str, code: str = "") -> None:
    """Count a job that has just ended: by method, its seconds by stage, its tokens."""
    assert status in FINAL_STATUSES
    facts = select(Job.recipe, Job.progress, Job.trained_tokens).where(Job.id == job_id)
    recipe, progress, tokens = session.execute(facts).one()
    method = str(recipe["lora"]["init"]["method"])
    stages = (progress or {}).get("stage_seconds") or {}
    counts = [CounterValue("stage_seconds", {"method": method, "stage": stage}, s) for stage, s in stages.items()]
    counts.append(CounterValue("jobs_finished", {"method": method, "status": status, "code": code}, 1))
    counts.append(CounterValue("trained_tokens", {"method": method}, tokens or 0))
    if code == "out_of_memory":
        counts.append(CounterValue("out_of_memory", {"outcome": "failed"}, 1))
    add_all(session, counts)
