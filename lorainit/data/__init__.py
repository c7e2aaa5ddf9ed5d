"""From a training file to batches of tokens: `formats` reads rows, `chat` makes text and tokens of them.

The rest of this folder is the dataset, the order of its rows, and the cache of tokens.
Knows tokenizers and chat templates, but no model.
"""
