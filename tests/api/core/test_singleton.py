"""What a process makes once."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest

from api.core.db import database
from api.core.singleton import singleton


def test_threads_that_come_first_at_once_get_the_same() -> None:
    first_is_making, second_came = Event(), Event()

    @singleton
    def thing() -> object:
        first_is_making.set()
        second_came.wait(300)
        return object()

    def second() -> object:
        first_is_making.wait(300)
        second_came.set()
        return thing()

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.submit(thing), pool.submit(second)
    assert one.result() is other.result()


@pytest.mark.usefixtures("environment")
def test_all_threads_share_one_engine() -> None:
    together = Barrier(8)

    def engine(_: int) -> int:
        together.wait(300)
        return id(database.get_engine())

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(engine, range(8)))) == 1


def test_an_error_is_not_kept() -> None:
    answers = iter([ValueError("the first time"), None])

    @singleton
    def thing() -> None:
        if (answer := next(answers)) is not None:
            raise answer

    with pytest.raises(ValueError, match="the first time"):
        thing()
    assert not thing.is_made
    assert thing() is None
    assert thing.is_made


def test_what_was_forgotten_is_made_anew() -> None:
    @singleton
    def thing() -> list[int]:
        return []

    first = thing()
    thing.cache_clear()
    assert thing() is not first
