"""A pretended GPU, for machines without one: whole runs whose tensors lie on the CPU and obey CUDA's rules.

`device.py` is the device, `rules.py` what CUDA would refuse, `flash.py` its attention, `engine.py` a `lorainit` that
takes it for CUDA. It finds what crashes on a GPU and would not here; it knows nothing of speed, rounding or races.
"""
