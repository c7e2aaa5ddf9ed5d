"""What a run computes on: the GPUs of a slot, the run's command and environment, and an examination of the machine.

Knows no database.
"""
