"""Whether a tokenizer reads texts in time: its regular expressions come with the base, from a stranger.

Oniguruma ends a match that goes back too often with an error, which is a refusal. An expression that stays below that
limit at each letter is slow all the same, and cannot be interrupted from Python: so it is tried on texts that grow,
when a base is inspected and when a run opens it. An expression that is slow on other texts than these is found by the
row that has one (`lorainit.data.reader`), where Oniguruma ends it.
"""

import time
from typing import Any

from lorainit.config.errors import UnsupportedModel
from lorainit.runtime.refusal import as_unsupported

MAX_SECONDS = 1.0  # of a processor, for a text of `LONGEST` letters; real tokenizers take some 0.002
LONGEST = 4096
_HARD = ("a", " ", "\n", "1", "-", ".", "aA", "a1 ", "a'", "\u00e9", "\u6f22", "\t x")
_END = "\u2603!"  # something that ends no expression's match


def read(tokenizer: Any, text: str | list[str], **options: bool) -> Any:
    """The encoding of a text, or of several at once, with the characters that its tokens stand for.

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
