"""Where a base model comes from and what its files hold, before a weight is read.

The files are not trusted: their sizes, shapes and names are checked here.
"""
