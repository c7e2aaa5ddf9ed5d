"""Losses at an equal budget."""

import pytest

from api.core.experiments.budgets import count_start, find_limit, find_loss


def curve(*losses: float, step: int = 10) -> list[dict[str, float]]:
    return [
        {"step": step * place, "tokens": 100 * step * place, "seconds": 2.0 * step * place, "valid_loss": loss}
        for place, loss in enumerate(losses)
    ]


def test_a_loss_between_two_evaluations_lies_on_the_line_between_them() -> None:
    assert find_loss(curve(3.0, 2.0, 1.5), at=15, of="step") == pytest.approx(1.75)
    assert find_loss(curve(3.0, 2.0, 1.5), at=20, of="step") == 1.5


def test_beyond_its_end_and_before_its_first_evaluation_a_run_has_no_loss() -> None:
    assert find_loss(curve(3.0, 2.0), at=11, of="step") is None
    assert find_loss(curve(3.0, 2.0)[1:], at=5, of="step") is None


def test_the_equal_budget_is_that_of_the_shortest_run() -> None:
    assert find_limit([curve(3.0, 2.0, 1.0), curve(3.0, 2.0)], of="tokens") == 1000
    assert find_limit([], of="tokens") is None


def test_what_the_initialization_spends_moves_the_curve_to_later() -> None:
    (first, second) = count_start(curve(3.0, 2.0), batches=4, seconds=7.0)
    assert (first["step"], first["tokens"], first["seconds"], first["valid_loss"]) == (4, 400, 7.0, 3.0)
    assert (second["step"], second["tokens"], second["seconds"]) == (14, 1400, 27.0)


def test_preheating_is_no_advantage_at_equal_steps() -> None:
    """Two runs that fall equally fast from step 0 of their training: the one that was preheated first is behind."""
    plain, preheated = curve(3.0, 2.0, 1.0), count_start(curve(3.0, 2.0, 1.0), batches=5, seconds=0.0)
    at = find_limit([plain, preheated], of="step")
    assert at == 20
    assert find_loss(preheated, at=20, of="step") == 1.5
    assert find_loss(plain, at=20, of="step") == 1.0
