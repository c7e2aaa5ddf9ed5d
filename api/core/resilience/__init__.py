"""Nobody waits long for something that we depend on and that is silent: a breaker, probes, calls in threads.

Knows no database and no storage: both use it.
"""
