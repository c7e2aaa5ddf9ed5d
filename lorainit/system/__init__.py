"""What library and service both ask of the system: which GPUs are there, bounds of a process, closed pipes.

Loads no torch, so the worker may use it before it starts a run. Imports no other folder of the library.
"""
