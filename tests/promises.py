"""Promised seconds, on a machine that has other things to do as well."""

import os


def within(seconds: float) -> float:
    """How long to wait for what takes so many seconds at most on an idle machine.

    That is longer in proportion to the processes that run or wait for a core: tests run beside each other.
    """
    return seconds * (1 + os.getloadavg()[0] / (os.cpu_count() or 1))
