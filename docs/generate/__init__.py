"""`make docs`: the parts of the documents that the code knows, and the pictures.

Settings, error codes, facts and rates of every method are tables between two marks of a page; the text around them
is written by hand. `tests/deploy/test_generated.py` makes them again and compares. Nothing here needs a network or a
model.
"""
