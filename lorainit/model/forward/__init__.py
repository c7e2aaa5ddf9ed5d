"""Parts of one forward pass: attention on packed rows, positions, the loss, recomputation, compiled regions.

All of it works on a model that is already loaded.
"""
