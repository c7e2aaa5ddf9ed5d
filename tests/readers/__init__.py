"""What people read downloads with: older PEFT and transformers, llama.cpp, vLLM, each in an environment of its own.

The reading programs beside the tests (`read_*.py`) run there: they may import nothing of ours.
"""
