"""Training: `loop` runs the steps, and `adapter_trainer` has the state of one adapter in it.

The other modules are optimizers, checkpoints, and the search for a pass size that fits into memory. Nothing here
depends on how adapters were initialized or on how they are exported.
"""
