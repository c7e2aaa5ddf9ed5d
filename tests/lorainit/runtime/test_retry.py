"""Work that runs out of memory is done again, as often as that makes it smaller and once more."""

import weakref

import pytest
import torch

from lorainit.config.errors import OutOfMemory
from lorainit.runtime.distributed.world import World
from lorainit.runtime.retry import any_rank, retry_until_it_fits


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
    assert retry_until_it_fits(work, work.smaller) == 3
    assert work.tried == [12, 6, 3]


def test_at_the_end_work_is_tried_once_more_as_it_is():
    work = Work(4, room=0)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        retry_until_it_fits(work, work.smaller)
    assert work.tried == [4, 2, 1, 1]


def test_work_that_cannot_be_smaller_has_two_attempts():
    work = Work(4, room=0)
    with pytest.raises(torch.OutOfMemoryError):
        retry_until_it_fits(work)
    assert work.tried == [4, 4]


def test_any_other_error_is_itself_at_once():
    work = Work(4, room=0, error=ValueError)
    with pytest.raises(ValueError, match="Tried to allocate"):
        retry_until_it_fits(work, work.smaller)
    assert work.tried == [4]


def test_processes_that_make_a_pass_together_have_one_attempt():
    work = Work(4, room=0)
    with pytest.raises(torch.OutOfMemoryError):
        retry_until_it_fits(work, work.smaller, world=World(0, 2, in_step=True))
    assert work.tried == [4]


TWO = World(0, 2)


def other_process(monkeypatch, *fails):
    """Each time that processes meet: whether the other one says that it has failed; then it has not any more."""
    left = iter(fails)

    def add_up(_world, tensors):
        (tensor,) = tensors
        tensor[-1] += float(next(left, False))

    monkeypatch.setattr(World, "all_reduce", add_up)


def test_where_another_process_never_fits_this_one_ends_too(monkeypatch):
    other_process(monkeypatch, *9 * [True])
    work = Work(2, room=9)
    with pytest.raises(OutOfMemory, match="Another process"):
        retry_until_it_fits(work, work.smaller, world=TWO)
    assert work.tried == [2, 1, 1]


def test_work_in_which_another_process_fails_is_left_at_the_next_question_and_done_again(monkeypatch):
    other_process(monkeypatch, False, True)
    asked = []

    def work():
        for number in range(3):
            any_rank(False, TWO, torch.device("cpu"))
            asked.append(number)
        return "done"

    assert retry_until_it_fits(work, world=TWO) == "done"
    assert asked == [0, 0, 1, 2]


def test_a_process_that_fails_answers_the_question_that_others_ask(monkeypatch):
    told = []
    monkeypatch.setattr(World, "all_reduce", lambda _world, tensors: told.append(tensors[0].tolist()))
    work = Work(2, room=1)
    assert retry_until_it_fits(work, work.smaller, world=TWO) == 1
    assert told == [[0, 1], [0, 0]]


def test_what_an_attempt_returned_is_let_go_of_where_another_process_failed(monkeypatch):
    other_process(monkeypatch, True)
    found = []

    def work():
        assert not [one for one in found if one() is not None]
        made = torch.empty(10)
        found.append(weakref.ref(made))
        return made

    retry_until_it_fits(work, world=TWO)
    assert len(found) == 2
