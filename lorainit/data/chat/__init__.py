"""From one row to tokens and the places that the loss looks at: chat template, answers, tokenizer.

Templates and tokenizers come with the base model, from a stranger, so they run within bounds.
"""
