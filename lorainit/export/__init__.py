"""The result of a run: the adapter in PEFT's file format, and the check that stock PEFT loads what was trained.

Nothing here depends on how an adapter was initialized.
"""
