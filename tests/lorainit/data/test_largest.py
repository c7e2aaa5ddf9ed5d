"""No pass that rows make is larger than the one that is tried, whichever of them a step draws."""

import random

import pytest
import torch

from lorainit.data.batches import Budget, split_into_batches
from lorainit.data.dataset import Sample
from lorainit.data.largest import Rows, Size, size_of


def row(length, trained=None):
    mask = torch.zeros(length, dtype=torch.bool)
    mask[length - (length if trained is None else trained) :] = True
    return Sample(1, torch.zeros(length, dtype=torch.int32), mask)


def some_rows(chance):
    """Rows of a few kinds, as data have them: mostly alike, with outliers, short answers, many of one length."""
    kinds = [chance.randint(1, 60) for _ in range(chance.randint(1, 4))]
    lengths = [max(1, chance.choice(kinds) + chance.randint(-3, 3)) for _ in range(chance.randint(1, 25))]
    return [row(n, chance.randint(0, n)) for n in lengths]


def regimes(chance):
    limit = chance.randint(1, 60)
    return chance.choice([lambda n: 0, lambda n: int(n > limit), lambda n: None if n > limit else 0, lambda n: n])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_no_draw_makes_a_larger_pass(seed, packed):
    chance = random.Random(f"{seed} {packed}")
    for _ in range(40):
        samples, regime = some_rows(chance), regimes(chance)
        most = chance.randint(1, 9)
        budget = Budget(most, chance.choice([1, chance.randint(1, 80), chance.randint(1, 400), 10_000]), packed)
        largest = size_of(Rows(samples, most).largest_pass(budget), packed=packed)
        for _ in range(40):
            drawn = chance.sample(samples, min(len(samples), chance.randint(most, 20)))
            for piece in split_into_batches(drawn, budget, regime):
                size = size_of(piece, packed=packed)
                assert largest.covers(size), (largest, size, budget, [len(s.ids) for s in samples])


@pytest.mark.parametrize("packed", [True, False])
def test_what_is_tried_is_hardly_larger_than_a_budget_allows(packed):
    chance = random.Random(0)
    for _ in range(300):
        samples, most, tokens = some_rows(chance), chance.randint(1, 9), chance.randint(1, 300)
        rows = Rows(samples, most).largest_pass(Budget(most, tokens, packed))
        longest = max(len(s.ids) for s in samples)
        size = size_of(rows, packed=packed)
        assert max(len(s.ids) for s in rows) <= longest
        assert size.tokens <= max(tokens, longest) * (1 if packed else 1.5)
        assert len(rows) <= most


@pytest.mark.parametrize("packed", [True, False])
def test_rows_of_one_length_are_tried_as_they_are(packed):
    samples = [row(50, 20)] * 30
    assert size_of(Rows(samples, 4).largest_pass(Budget(4, 1000, packed)), packed=packed) == Size(200, 10_000, 80)
    assert size_of(Rows(samples, 1).largest_pass(Budget(1, 1000, packed)), packed=packed) == Size(50, 2500, 20)


@pytest.mark.parametrize("packed", [True, False])
def test_whether_a_step_may_need_several_passes_is_known_of_all_steps(packed):
    chance = random.Random(1)
    for _ in range(300):
        samples, most = some_rows(chance), chance.randint(1, 9)
        budget = Budget(most, chance.randint(1, 400), packed)
        if Rows(samples, most).takes_one_pass(budget):
            for _ in range(20):
                assert len(split_into_batches(chance.sample(samples, min(len(samples), most)), budget)) == 1
