"""Checks that a tokenizer is fast enough, because its regular expressions come from a source that we do not trust.

The library Oniguruma ends a match with an error if it backtracks too often. An expression that stays below that limit
at each letter may still be slow, and cannot be interrupted from Python. So the tokenizer is tried on longer and longer
texts, when a base is inspected and when a run opens it. An expression may be slow only on other texts than these. Then
Oniguruma's limit ends it at the row with such a text (`lorainit.data.reader`).
"""

import time
from typing import Any

from lorainit.config.errors import UnsupportedModel
from lorainit.runtime.refusal import as_unsupported

MAX_SECONDS = 1.0  # of a processor, for a text of `LONGEST` letters; real tokenizers take some 0.002
LONGEST = 4096
_HARD = ("a", " ", "\n", "1", "-", ".", "aA", "a1 ", "a'", "\u00e9", "\u6f22", "\t x")
_END = "\u2603!"  # behind a repeated part, so that a match fails there and the expression has to backtrack


def read(tokenizer: Any, text: str | list[str], **options: bool) -> Any:
    """The encoding of a text, or of several at once, with the character positions of its tokens.

    Raises:
        UnsupportedModel: the tokenizer cannot read it.
    """
    try:
        with as_unsupported("The base model's tokenizer cannot read a text"):
            return tokenizer(text, return_offsets_mapping=True, verbose=False, **options)
    except UnsupportedModel as error:
        if "retry-limit" not in error.message:
            raise
        why = "one of its regular expressions takes too long, going back again and again"
        raise UnsupportedModel(
            f"The base model's tokenizer cannot read a text of {len(text)} letters: {why}.", param="model"
        ) from error


def require_quick(tokenizer: Any) -> None:
    """Raise `UnsupportedModel` where a text of a few thousand letters takes more than `MAX_SECONDS`."""
    length = 64
    while length <= LONGEST:
        for part in _HARD:
            text = (part * length)[:length] + _END
            started = time.process_time()
            read(tokenizer, text)
            if time.process_time() - started > MAX_SECONDS:
                found = f"takes more than {MAX_SECONDS:.0f} s for a text of {len(text)} letters"
                raise UnsupportedModel(f"The base model's tokenizer {found}.", param="model")
        length *= 2
