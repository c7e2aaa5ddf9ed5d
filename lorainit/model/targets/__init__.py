"""Which layers of a base model a run adapts, which of them stock PEFT accepts, and which are not quantized.

Imports `layers`. Nothing here reads data or files.
"""
