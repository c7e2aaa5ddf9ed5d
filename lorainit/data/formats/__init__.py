"""Checks rows and whole training files: which formats a row may have, and what is wrong with it.

It needs no tokenizer and does not import torch, because the service checks every uploaded file with it in a process
that has to start fast.
"""
