"""The training: `loop` is the whole of it, `adapter_trainer` one adapter's way through it.

Beside them: optimizers, checkpoints, and passes that fit into memory. Knows nothing of how adapters were
initialized or of what is exported.
"""
