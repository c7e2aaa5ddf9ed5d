"""The sections of `make gpu-day` (`benchmarks/gpu_day.py`): each a function that says markdown lines."""
