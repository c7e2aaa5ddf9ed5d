"""The base model: loading it, which of its layers can carry a LoRA, and how its attention runs on packed rows.

Knows nothing of initializations, of training or of what is exported.
"""
