"""From a training file to batches of tokens: `formats` reads rows, `chat` turns them into text.

The other modules tokenize the text, cache the tokens, choose the order of rows and make batches. Nothing here needs a
model, only its tokenizer and chat template.
"""
