"""Which layers of a base model a run adapts, what stock PEFT accepts, and which layers four bits leave alone.

Imports `layers`; knows nothing of data or of files.
"""
