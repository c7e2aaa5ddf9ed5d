"""Finds a base model and checks its files before any weight is loaded.

The files are not trusted, so their sizes, shapes and names are checked here.
"""
