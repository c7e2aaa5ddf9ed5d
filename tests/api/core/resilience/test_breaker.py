"""What is silent is noticed by one look, let go of at once, and taken up again by itself. No test waits."""

from collections.abc import Callable

import pytest

from api.core.resilience import breaker
from api.core.resilience.breaker import Breaker


class Dependency:
    """Something whose looks take as long as the test says; time moves by looks and pauses alone."""

    def __init__(self) -> None:
        self.time, self.looks, self.pauses = 100.0, 0, 0
        self.takes: list[float] = []
        self.error: Exception | None = None
        self.begun: list[Callable[[], None]] = []
        self.breaker = Breaker(
            "thing", self.look, clock=lambda: self.time, pause=self.pause, start=self.begun.append
        )  # a look begins when the test runs it

    def look(self) -> None:
        self.looks += 1
        self.time += self.takes.pop(0)
        if self.error:
            raise self.error

    def pause(self, seconds: float) -> None:
        self.pauses += 1
        self.time += seconds

    def heard_nothing_for(self, seconds: float) -> None:
        self.breaker.report_silence(self.time - seconds)


@pytest.fixture
def thing() -> Dependency:
    return Dependency()


def test_nobody_looks_because_of_a_short_silence(thing: Dependency) -> None:
    thing.heard_nothing_for(breaker.SILENCE_SECONDS - 0.1)
    assert not thing.begun


def test_many_who_wait_cost_one_look(thing: Dependency) -> None:
    for _ in range(100):
        thing.heard_nothing_for(5)
    assert len(thing.begun) == 1


def test_a_look_in_time_keeps_it_closed_and_holds_for_a_moment(thing: Dependency) -> None:
    thing.takes = [0.5]
    thing.heard_nothing_for(5)
    thing.begun[0]()
    thing.heard_nothing_for(5)
    assert (thing.breaker.is_open, len(thing.begun)) == (False, 1)
    thing.time += breaker.GOOD_SECONDS
    thing.heard_nothing_for(5)
    assert len(thing.begun) == 2


def test_an_error_is_an_answer(thing: Dependency) -> None:
    thing.takes, thing.error = [0.5], OSError("refused")
    thing.heard_nothing_for(5)
    thing.begun[0]()
    assert not thing.breaker.is_open


def test_a_look_without_an_end_opens_it(thing: Dependency) -> None:
    thing.heard_nothing_for(1)
    thing.time += breaker.PROBE_SECONDS
    assert not thing.breaker.is_open
    thing.time += 0.1
    assert thing.breaker.is_open


def test_it_stays_open_until_a_look_is_in_time_and_nobody_has_to_ask(thing: Dependency) -> None:
    thing.takes = [4, 4, 4, 0.1]
    opened: list[bool] = []
    thing.breaker._pause = lambda seconds: opened.append(thing.breaker.is_open)
    thing.heard_nothing_for(1)
    thing.begun[0]()
    assert opened == [True] * 3
    assert (thing.breaker.is_open, thing.looks) == (False, 4)


def test_after_it_closed_the_next_silence_is_looked_at(thing: Dependency) -> None:
    thing.takes = [4, 0.1]
    thing.heard_nothing_for(1)
    thing.begun[0]()
    thing.time += 60
    thing.heard_nothing_for(1)
    assert (len(thing.begun), thing.pauses) == (2, 1)


def test_the_promise_of_five_seconds_has_room() -> None:
    silent = breaker.SILENCE_SECONDS + breaker.GOOD_SECONDS + breaker.PROBE_SECONDS
    assert silent < 5
