"""The life of a job, from the request (`submit`) to its adapter and checkpoints (`results`).

A status changes in `transitions` and nowhere else; `jobs` and `pauses` give the changes their names.
"""
