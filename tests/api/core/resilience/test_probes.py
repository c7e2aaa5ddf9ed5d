"""Whether something works, as an orchestrator is told: no bad moment is a "no", and a real one is told soon."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import obstore
import pytest

from api.core.files.storage import make_storage
from api.core.resilience import probes
from api.core.resilience.probes import Probe
from api.core.settings import Settings


class Thing:
    """What is looked at, and a clock that the test moves."""

    def __init__(self) -> None:
        self.works, self.looks, self.time = True, 0, 100.0
        self.probe = Probe("thing", self.look, clock=lambda: self.time)

    def look(self) -> int:
        self.looks += 1
        if not self.works:
            raise OSError("it does not answer")
        return self.looks

    def later(self, seconds: float, *, works: bool) -> bool:
        self.time, self.works = self.time + seconds, works
        return self.probe.works()


@pytest.fixture
def thing() -> Thing:
    return Thing()


def test_a_good_answer_holds_for_a_few_seconds(thing: Thing) -> None:
    assert thing.probe.works()
    assert thing.later(probes.GOOD_SECONDS, works=False)
    assert (thing.looks, thing.probe.found) == (1, 1)


def test_one_bad_look_is_no_no_and_is_looked_at_again_soon(thing: Thing) -> None:
    assert thing.probe.works()
    assert thing.later(60, works=False)
    assert thing.later(1.1, works=True)
    assert thing.looks == 3
    assert thing.later(100, works=False), "an earlier bad look is forgotten"


def test_what_stays_bad_is_a_no_and_one_good_look_ends_it(thing: Thing) -> None:
    assert thing.probe.works()
    said = [thing.later(1.1, works=False) for _ in range(10)]
    assert said.index(False) < 9
    assert not any(said[said.index(False) :])
    assert thing.later(1.1, works=True)


def test_what_never_was_good_is_a_no_at_once(thing: Thing) -> None:
    assert not thing.later(0, works=False)
    assert not thing.later(0.9, works=True), "looked at again only after a second"
    assert thing.later(0.2, works=True)


def test_many_askers_cost_one_look_and_do_not_wait_for_it(thing: Thing) -> None:
    began, end = threading.Event(), threading.Event()
    thing.probe.works()
    look = thing.look

    def slow() -> int:
        began.set()
        assert end.wait(10)
        return look()

    thing.probe._check = slow
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(thing.later, 60, works=True)
        assert began.wait(10)
        assert all(thing.probe.works() for _ in range(50))
        assert not thing.later(probes.TOLERATED_SECONDS, works=True), "a look that hangs"
        end.set()
        assert first.result()
    assert thing.looks == 2


def test_probes_of_one_store_do_not_disturb_each_other(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("storage")
    ours, theirs = (make_storage(folder.as_uri(), Settings()) for _ in range(2))
    read: Callable[..., object] = obstore.get_range

    def after_another(*arguments: object, **more: object) -> object:
        monkeypatch.setattr(obstore, "get_range", read)
        theirs.probe()  # as another process does just now
        return read(*arguments, **more)

    monkeypatch.setattr(obstore, "get_range", after_another)
    ours.probe()
    assert not [path for path in folder.rglob("*") if path.is_file()]
