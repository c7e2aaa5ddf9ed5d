"""What the runs of one host share: GPUs, disk space, scratch folders, caches, memory.

Knows nothing of a single job.
"""
