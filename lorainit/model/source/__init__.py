"""Where a base model comes from and what its files hold, before a weight is read.

Whoever made the files is not trusted: sizes, shapes and names are checked here.
"""
