"""Experiments: initializations compared with each other on the same data, at several learning rates and seeds.

May know jobs, files and models of `api.core`; nothing else in `api.core` may know experiments.
"""
