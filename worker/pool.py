"""Checks that Celery's command line fits our settings: as many forked processes as slots, and the same queues.

Celery alone starts as many processes as its command line says, or as the machine has cores. A process without a slot of
its own would share a GPU with another, or train on the processor. So options must not contradict the settings.
"""

from collections.abc import Mapping
from typing import Any

from celery import concurrency

from api.core.settings import get_settings


def find_conflict(options: Mapping[str, Any]) -> str | None:
    """Why the options of a Celery worker do not fit the settings, or what a worker needs; None if they do."""
    return _pool(options) or _size(options) or _queues(options)


def _pool(options: Mapping[str, Any]) -> str | None:
    """Only Celery's forked processes know their slot and their parent, so other pools are refused."""
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
        " of its own. Leave -c out, because the number of slots decides."
    )


def _queues(options: Mapping[str, Any]) -> str | None:
    asked, ours = options.get("queues"), get_settings().queues()
    if options.get("exclude_queues"):
        return "LORAINIT_WORKER_QUEUES says from which queues jobs are taken: leave -X (--exclude-queues) out."
    if not asked or set(asked) == set(ours):
        return None
    return (
        f"-Q (--queues) names {', '.join(asked)}, and LORAINIT_WORKER_QUEUES is {', '.join(ours)}, from which jobs are"
        " taken. Leave -Q out, because the setting decides."
    )
