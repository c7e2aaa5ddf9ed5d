"""From one row to its text and the answers in it: chat template, position of the answers, tokenizer.

Templates and tokenizers come with the base model from a source that we do not trust, so their time and memory are
limited.
"""
