"""The sums of docs/sizes.md are the command's, and its parts are what they say."""

from pathlib import Path

from benchmarks import sizes
from benchmarks.gpu.day import SHAPES
from benchmarks.train_page import section
from lorainit.model import memory

PAGE = Path(__file__).parents[2] / "docs" / "sizes.md"


def test_the_page_shows_what_the_command_says_today() -> None:
    before, after = section(PAGE, sizes.NAME)
    shown = PAGE.read_text().removeprefix(before).removesuffix(after)
    assert shown.strip() == sizes.table(), "python benchmarks/sizes.py --write docs/sizes.md"


def test_a_number_that_is_trained_costs_sixteen_bytes_for_every_weight_of_both_factors() -> None:
    shape = SHAPES["tiny"]  # 64 wide, 128 in the MLP, two layers, keys and values half as wide
    sides = (64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3
    assert sizes.sums(shape)["trained"] == 16 * sizes.RANK * sides * 2


def test_four_bits_are_those_of_linear_layers_alone() -> None:
    shape = SHAPES["tiny"]
    found = sizes.sums(shape)
    rest = memory.weight_bytes(sizes.base_of({**shape, "num_hidden_layers": 0})) + 2 * 2 * 64 * 2  # and four norms
    assert found["nf4"] - rest == (found["weights"] - rest) / 2 * sizes.NF4


def test_no_weight_is_made() -> None:
    assert all(weight.is_meta for weight in sizes.base_of(SHAPES["8B"]).parameters())
