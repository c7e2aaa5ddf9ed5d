"""The zoo: tiny random bases of the architectures that people bring, and the examination of each.

`bases` makes the folders and knows nothing of Lorainit.
"""
