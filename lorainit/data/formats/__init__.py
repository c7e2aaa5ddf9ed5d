"""What a row of a training file may look like, and the verdict on a whole file.

Needs no tokenizer and loads no torch: the service checks uploaded files with it, in a process of its own.
"""
