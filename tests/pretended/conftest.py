"""Tests for a GPU are run or refused: a machine without one must not say that they passed."""

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse `pytest -m gpu` where there is none."""
    if session.config.option.collectonly or not any(item.get_closest_marker("gpu") for item in session.items):
        return
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError(
            "pytest -m gpu needs a GPU that this torch can use, and there is none: `lorainit doctor` says why."
        )
