"""A run of several processes in which nothing happens any more is over."""

import threading

from lorainit.config.events import Stage, Tick
from lorainit.system import watchdog
from lorainit.system.watchdog import BEAT_SECONDS, DEFAULT_SECONDS, Watchdog, start

BEATS = int(DEFAULT_SECONDS / BEAT_SECONDS)
EVENT = Tick(done=1, total=2)


def test_silence_after_an_event_is_too_long_in_the_end():
    lasting = Watchdog()
    lasting.reset(EVENT)
    assert [lasting.add_seconds(BEAT_SECONDS) for _ in range(BEATS + 1)] == [False] * BEATS + [True]


def test_every_event_begins_it_anew():
    lasting = Watchdog()
    for _ in range(3):
        lasting.reset(EVENT)
        assert not any(lasting.add_seconds(BEAT_SECONDS) for _ in range(BEATS))


def test_before_the_first_event_and_while_the_base_is_loaded_it_may_last_four_times_as_long():
    lasting = Watchdog()
    assert [lasting.add_seconds(BEAT_SECONDS) for _ in range(4 * BEATS + 1)] == [False] * 4 * BEATS + [True]
    lasting.reset(Stage(stage="loading", message="m"))
    assert [lasting.add_seconds(BEAT_SECONDS) for _ in range(4 * BEATS + 1)] == [False] * 4 * BEATS + [True]
    lasting.reset(Stage(stage="training", message="m"))
    assert [lasting.add_seconds(BEAT_SECONDS) for _ in range(BEATS + 1)] == [False] * BEATS + [True]


def test_the_limit_is_the_environments(monkeypatch):
    monkeypatch.setenv(watchdog.VARIABLE, "3")
    lasting, over = Watchdog(), threading.Event()
    lasting.reset(EVENT)
    start(lasting, over.set)
    assert over.wait(60)
    assert "nothing has happened for 3 seconds" in watchdog.timeout_failure().message


def test_one_who_looks_from_outside_counts_a_long_time_between_two_looks_as_one_beat(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    lasting = Watchdog(2 * BEAT_SECONDS, extra=BEAT_SECONDS)
    lasting.reset(Stage(stage="training", message=""))
    looks = []
    for _ in range(4):
        now[0] += 1000 * BEAT_SECONDS
        looks.append(lasting.is_overdue())
    assert looks == [False, False, False, True]
