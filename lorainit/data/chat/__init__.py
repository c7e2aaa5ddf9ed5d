"""From one row to its text and the places in it that the loss looks at: chat template, answers, tokenizer.

Templates and tokenizers come with the base model, from a stranger, so they run within bounds.
"""
