"""Bounds the waiting for a dependency that does not answer: a breaker, probes, calls in threads.

Knows no database and no storage: both use it.
"""
