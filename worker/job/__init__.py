"""One job while it runs: its lease, its files, its progress, and how it ends.

Every write is fenced: a worker that has lost the lease changes nothing.
"""
