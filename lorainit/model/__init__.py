"""The base model: loading it, which of its layers can carry a LoRA, and how its attention runs on packed rows.

Nothing here depends on initializations, on training or on the export.
"""
