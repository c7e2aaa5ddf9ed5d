"""Promised seconds, on a machine that has other things to do as well."""

import os

from lorainit.runtime.process_tuning import usable_cpus

AT_MOST = 4.0  # times the promise; beyond that, a test that waited for nothing would pass, too


def within(seconds: float) -> float:
    """How long to wait for what takes so many seconds at most on an idle machine.

    That is longer if more processes run or wait than there are cores, because tests run beside each other.
    """
    return seconds * min(AT_MOST, max(1.0, os.getloadavg()[0] / usable_cpus()))
