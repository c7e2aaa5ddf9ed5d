"""A run of several processes in which nothing happens any more is over."""

import threading

from lorainit.config.events import Stage, Tick
from lorainit.system import watchdog
from lorainit.system.watchdog import BEAT, USUAL, Silence, watch

BEATS = int(USUAL / BEAT)
EVENT = Tick(done=1, total=2)


def test_silence_after_an_event_is_too_long_in_the_end():
    lasting = Silence()
    lasting.hear(EVENT)
    assert [lasting.beat(BEAT) for _ in range(BEATS + 1)] == [False] * BEATS + [True]


def test_every_event_begins_it_anew():
    lasting = Silence()
    for _ in range(3):
        lasting.hear(EVENT)
        assert not any(lasting.beat(BEAT) for _ in range(BEATS))


def test_before_the_first_event_and_while_the_base_is_loaded_it_may_last_four_times_as_long():
    lasting = Silence()
    assert [lasting.beat(BEAT) for _ in range(4 * BEATS + 1)] == [False] * 4 * BEATS + [True]
    lasting.hear(Stage(stage="loading", message="m"))
    assert [lasting.beat(BEAT) for _ in range(4 * BEATS + 1)] == [False] * 4 * BEATS + [True]
    lasting.hear(Stage(stage="training", message="m"))
    assert [lasting.beat(BEAT) for _ in range(BEATS + 1)] == [False] * BEATS + [True]


def test_the_limit_is_the_environments(monkeypatch):
    monkeypatch.setenv(watchdog.SECONDS, "3")
    lasting, over = Silence(), threading.Event()
    lasting.hear(EVENT)
    watch(lasting, over.set)
    assert over.wait(60)
    assert "nothing has happened for 3 seconds" in watchdog.failure().message


def test_one_who_looks_from_outside_counts_a_long_time_between_two_looks_as_one_beat(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    lasting = Silence(2 * BEAT, later=BEAT)
    lasting.hear(Stage(stage="training", message=""))
    looks = []
    for _ in range(4):
        now[0] += 1000 * BEAT
        looks.append(lasting.look())
    assert looks == [False, False, False, True]
