"""Facts and functions of the operating system: which GPUs exist, limits of a process, closed pipes.

Loads no torch, so that the worker can use it before it starts a run.
"""
