"""Checks that a tokenizer fits a model: every token that a row can hold needs a row of the embedding.

Checked before a run, because a token without one would stop the run in the middle, and on a GPU end the whole process.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from lorainit.config.errors import UnsupportedModel
from lorainit.model.source.files import list_first

# Tokens that are added to rows automatically.
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def rows_of(model: Any) -> int:
    """How many tokens the model's embedding has."""
    return int(model.get_input_embeddings().weight.shape[0])


def require_rows(tokenizer: Any, model: Any) -> None:
    """Raise `UnsupportedModel` if a token of ordinary text, or one that a run adds, has no row.

    Special tokens may lie beyond (Gemma 3 1B has one for images), because ordinary text does not contain them. Tokens
    that a chat template writes are checked by `require_known`.
    """
    rows = rows_of(model)
    for role in _ROLES:
        number = getattr(tokenizer, f"{role}_id")
        if number is not None and not 0 <= number < rows:
            token = getattr(tokenizer, role)
            raise _refusal(rows, f"its {role} is {token!r} with the number {number}")
    special = set(tokenizer.all_special_tokens)
    special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    beyond = [token for token, number in tokenizer.get_vocab().items() if number >= rows and token not in special]
    if beyond:
        raise _refusal(rows, f"the vocabulary has tokens with higher numbers: {list_first(beyond)}")


def require_known(texts: Iterable[Tensor | Sequence[int]], tokenizer: Any, model: Any) -> None:
    """Raise `UnsupportedModel` if a text that a chat template wrote has a token without a row.

    Args:
        texts: the token ids of each text.
    """
    rows = rows_of(model)
    for ids in texts:
        if len(ids) and (number := int(max(ids) if isinstance(ids, Sequence) else ids.max())) >= rows:
            token = tokenizer.convert_ids_to_tokens(number)
            raise _refusal(rows, f"the chat template writes {token!r} with the number {number}")


def _refusal(rows: int, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"The base model's tokenizer does not fit its weights: the embedding has {rows} rows, and {what}.",
        param="model",
    )
