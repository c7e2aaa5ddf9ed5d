"""What `tests.lorainit.forked` loads once, before it forks a run for a test."""

from lorainit import warm
from tests.lorainit import forked  # noqa: F401

warm.preload()
