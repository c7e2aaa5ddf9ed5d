"""What a run computes on and finds there: GPUs of a slot, its program and environment, an examination.

Knows no database.
"""
