"""Celery's options and our settings are one thing: as many processes as slots, forked, on the settings' queues.

Celery alone would start as many processes as it is told, or as the machine has cores. One without a slot of its own
would share a GPU with another, or train on the processor. What is said on the command line may only say the same.
"""

from collections.abc import Mapping
from typing import Any

from celery import concurrency

from api.core.settings import get_settings


def find_conflict(options: Mapping[str, Any]) -> str | None:
    """What in the options of a Celery worker contradicts the settings, or what a worker needs; None: nothing."""
    return _pool(options) or _size(options) or _queues(options)


def _pool(options: Mapping[str, Any]) -> str | None:
    """Only a forked process of its own knows its slot, and finds its parent's flags."""
    pool = options.get("pool") or "prefork"
    if concurrency.get_implementation(pool) is not concurrency.get_implementation("prefork"):
        return "this worker needs Celery's prefork pool, in which each slot is a process: leave --pool out."
    if options.get("pool_start_method") not in (None, "fork"):
        return "the processes of this worker are forked: leave --pool-start-method out."
    for name in ("max_tasks_per_child", "max_memory_per_child"):
        if options.get(name):
            return f"a slot's process remembers how its GPU has failed: leave --{name.replace('_', '-')} out."
    return None


def _size(options: Mapping[str, Any]) -> str | None:
    slots, size = get_settings().worker_slots, options.get("concurrency")
    if options.get("autoscale"):
        return (
            f"--autoscale changes the number of processes, and each has a slot of its own: set LORAINIT_WORKER_SLOTS"
            f" (now {slots}) and leave it out."
        )
    if size is None or str(size) == str(slots):
        return None
    return (
        f"-c (--concurrency) asks for {size} processes, and LORAINIT_WORKER_SLOTS is {slots}; each process has a slot"
        " of its own. Leave -c out: the number of slots counts."
    )


def _queues(options: Mapping[str, Any]) -> str | None:
    asked, ours = options.get("queues"), get_settings().queues()
    if options.get("exclude_queues"):
        return "LORAINIT_WORKER_QUEUES says from which queues jobs are taken: leave -X (--exclude-queues) out."
    if not asked or set(asked) == set(ours):
        return None
    return (
        f"-Q (--queues) names {', '.join(asked)}, and LORAINIT_WORKER_QUEUES is {', '.join(ours)}, from which jobs are"
        " taken. Leave -Q out: the setting counts."
    )
