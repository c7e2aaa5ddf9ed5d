"""Work that runs out of memory is done again, as often as that makes it smaller and once more."""

import weakref

import pytest
import torch

from lorainit.config.errors import OutOfMemory
from lorainit.runtime.distributed.world import World
from lorainit.runtime.retry import until_it_fits


class Work:
    """Takes `size` and fits into `room`; what an attempt held is noted, and whether it is still there."""

    def __init__(self, size, room, error=torch.OutOfMemoryError):
        self.size, self.room, self.error, self.tried, self.held = size, room, error, [], []

    def __call__(self):
        assert not any(one() is not None for one in self.held), "an attempt that failed holds memory"
        self.tried.append(self.size)
        large = torch.empty(10)
        self.held.append(weakref.ref(large))
        if self.size > self.room:
            raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.size

    def smaller(self):
        before, self.size = self.size, max(1, self.size // 2)
        return self.size < before


def test_work_gets_smaller_until_it_fits():
    work = Work(12, room=3)
    assert until_it_fits(work, work.smaller) == 3
    assert work.tried == [12, 6, 3]


def test_at_the_end_work_is_tried_once_more_as_it_is():
    work = Work(4, room=0)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        until_it_fits(work, work.smaller)
    assert work.tried == [4, 2, 1, 1]


def test_work_that_cannot_be_smaller_has_two_attempts():
    work = Work(4, room=0)
    with pytest.raises(torch.OutOfMemoryError):
        until_it_fits(work)
    assert work.tried == [4, 4]


def test_any_other_error_is_itself_at_once():
    work = Work(4, room=0, error=ValueError)
    with pytest.raises(ValueError, match="Tried to allocate"):
        until_it_fits(work, work.smaller)
    assert work.tried == [4]


def test_processes_that_make_a_pass_together_have_one_attempt():
    work = Work(4, room=0)
    with pytest.raises(torch.OutOfMemoryError):
        until_it_fits(work, work.smaller, world=World(0, 2, in_step=True))
    assert work.tried == [4]


def test_where_another_process_never_fits_this_one_ends_too(monkeypatch):
    monkeypatch.setattr(World, "anybody", lambda *_: True)
    work = Work(2, room=9)
    with pytest.raises(OutOfMemory, match="Another process"):
        until_it_fits(work, work.smaller, world=World(0, 2))
    assert work.tried == [2, 1, 1]
