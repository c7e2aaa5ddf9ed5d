"""Queued jobs: their order, their positions, which of them are trained together, which workers are alive.

`notify` is the outbox and `queue` the Celery message that wakes a worker.
"""
