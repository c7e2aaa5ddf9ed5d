"""Measures every initialization on real data with the service itself: docs/evidence.md."""
