"""A run of several processes in which nothing happens any more is over."""

import threading

from lorainit import silence
from lorainit.errors import DeviceSilent
from lorainit.events import Stage, Tick
from lorainit.isolation import our_error
from lorainit.silence import BEAT, USUAL, Silence, watch

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


def test_nobody_is_impatient_before_the_first_event_or_while_the_base_is_loaded():
    lasting = Silence()
    assert not any(lasting.beat(BEAT) for _ in range(2 * BEATS))
    lasting.hear(EVENT)
    lasting.hear(Stage(stage="loading", message="m"))
    assert not any(lasting.beat(BEAT) for _ in range(2 * BEATS))


def test_the_limit_is_the_environments(monkeypatch):
    monkeypatch.setenv(silence.SECONDS, "3")
    lasting, over = Silence(), threading.Event()
    lasting.hear(EVENT)
    watch(lasting, over.set)
    assert over.wait(60)
    assert "nothing has happened for 3 seconds" in silence.failure().message


def test_what_gloo_says_of_a_process_that_does_not_answer_is_told_in_the_same_words():
    said = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete"
    found = our_error(RuntimeError(said))
    assert isinstance(found, DeviceSilent)
    assert found.message == silence.failure().message
