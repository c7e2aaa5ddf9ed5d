"""Parts of one forward pass: attention on packed rows, positions, the loss, recomputation, compiled regions.

Knows no files of a model: it is given a model that is loaded.
"""
