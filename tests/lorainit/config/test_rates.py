"""Default learning rates: whose they are, how sizes in between are met, and what a base's own rate does to them."""

import pytest

from lorainit.config.inits import INITS
from lorainit.config.inits.plain import Kaiming
from lorainit.config.inits.weights import LoRAM
from lorainit.config.rates import RATES, SIZES, MissingRates, default_rate, find_rates
from lorainit.config.resolve import base_learning_rate, resolve, with_base_rate
from lorainit.config.spec import BaseModelRef, Hyperparameters

KAIMING, LORAM = Kaiming(method="kaiming"), LoRAM(method="loram")


def base(**facts):
    return BaseModelRef(id="x", source="x", root="local:x", **facts)


@pytest.mark.parametrize("name", INITS)
def test_every_initialization_has_a_rate_for_every_size_and_its_source(name):
    row = find_rates(INITS[name].model_validate({"method": name}))
    assert len(row) == len(SIZES)
    assert all(rate.source and 1e-7 < rate.value < 1e-2 for rate in row)


def test_an_initialization_without_rates_is_told_the_line_and_the_file(monkeypatch):
    monkeypatch.delitem(RATES, "loram")
    with pytest.raises(
        MissingRates, match=r'add the line "loram": \(Rate.*to RATES in lorainit/config/rates\.py'
    ) as told:
        default_rate(LORAM, weights=1000)
    assert str(told.value).startswith("loram has no default learning rates: ")


@pytest.mark.parametrize("name", RATES)
def test_a_larger_base_never_has_a_larger_rate(name):
    method = INITS[name.split()[0]].model_validate(
        {"method": name.split()[0], **({"version": "v1"} if " " in name else {})}
    )
    found = [default_rate(method, weights=10**power) for power in range(4, 13)]
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (RATES[name][0].value, RATES[name][-1].value)


def test_the_rate_of_a_size_in_the_table_is_the_tables():
    for size, rate in zip(SIZES.values(), RATES["loram"], strict=True):
        assert default_rate(LORAM, weights=int(size)) == pytest.approx(rate.value)


def test_halfway_between_two_sizes_is_the_geometric_mean_of_their_rates():
    small, middle, _ = SIZES.values()
    rate = default_rate(KAIMING, weights=round((small * middle) ** 0.5))
    assert rate == pytest.approx((RATES["kaiming"][0].value * RATES["kaiming"][1].value) ** 0.5, rel=0.05)


def test_the_authors_rate_is_the_default_at_the_size_they_trained():
    assert base_learning_rate(base(weights=int(SIZES["7B"])), LORAM) == pytest.approx(2e-5)


def test_another_start_takes_its_share_of_a_bases_own_measured_rate():
    own = base(weights=int(SIZES["7B"]), base_learning_rate=3e-4)
    assert base_learning_rate(own, KAIMING) == pytest.approx(3e-4)
    assert base_learning_rate(own, LORAM) == pytest.approx(3e-5)


def test_a_rate_that_was_decided_before_the_table_changed_stays():
    decided = Hyperparameters(learning_rate=1e-3, learning_rate_multiplier=2.0)
    model = with_base_rate(base(weights=1000), decided, LORAM)
    training, _ = resolve(decided, rows=100, model=model, method=LORAM)
    assert (training.learning_rate, training.learning_rate_multiplier) == (1e-3, 2.0)
