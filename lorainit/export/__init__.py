"""What a run hands over: the adapter in PEFT's files, and the proof that stock PEFT reads it as it was trained.

Knows nothing of how an adapter was initialized.
"""
