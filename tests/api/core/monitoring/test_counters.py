"""Counts under competition: many at once, none lost, and a rolled-back transaction counts nothing."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from api.core.db.database import session_scope
from api.core.monitoring import counters
from api.core.monitoring.counters import CounterValue

pytestmark = pytest.mark.usefixtures("service")

NAMES = ("stage_seconds", "jobs_finished", "trained_tokens")


def test_counts_that_many_add_to_at_once_are_all_there() -> None:
    def one(number: int) -> None:
        # In another order every time: they are written in one.
        names = [NAMES[(number + shift) % 3] for shift in range(3)]
        with session_scope() as session:
            counters.add_all(session, [CounterValue(name, {"method": "loram"}, 1) for name in names])
            session.commit()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(40)))
    with session_scope() as session:
        assert [(count.name, count.value) for count in counters.read(session)] == [(name, 40) for name in sorted(NAMES)]


def test_what_is_rolled_back_is_not_counted() -> None:
    with session_scope() as session:
        counters.add(session, "leases_lost")
    with session_scope() as session:
        assert counters.read(session) == []
