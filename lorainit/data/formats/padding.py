"""Removes keys that are null only because of the tool that wrote the file.

Arrow gives every row the keys of all rows, and some libraries dump objects with all their fields. Such a null key means
the same as a missing one. Does not import torch.
"""

from typing import Any

# These keys are kept if they are null, because then null may be meant: the checks have messages of their own for it.
_MEANT = {"role", "content"}
# Keys of a JSON Schema that are kept if they are null, because null is a valid value there.
_VALUES = {"default", "const", "enum", "examples"}
# Lists that are removed if they are empty, since a dumped message has them without a meaning.
_EMPTY = {"tool_calls", "annotations"}


def remove_padding(row: dict[str, Any]) -> dict[str, Any]:
    """A copy of the row without null keys, also in its messages, calls and tools. `row` itself is not changed."""
    row = _filled(row)
    for key in ("messages", "preferred_output", "non_preferred_output"):
        if isinstance(row.get(key), list):
            row[key] = [_message(message) for message in row[key]]
    for key in ("tools", "functions"):
        if isinstance(row.get(key), list):
            row[key] = [_schema(tool) for tool in row[key]]
    if isinstance(row.get("input"), dict):
        row["input"] = remove_padding(row["input"])
    return row


def _message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    kept = {key: value for key, value in message.items() if value is not None or key in _MEANT}
    kept = {key: value for key, value in kept.items() if not (value == [] and key in _EMPTY)}
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_call(call) for call in kept["tool_calls"]]
    return kept


def _call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    call = _filled(call)
    return {**call, "function": _filled(call["function"])} if isinstance(call.get("function"), dict) else call


def _filled(thing: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in thing.items() if value is not None}


def _schema(value: Any) -> Any:
    if isinstance(value, list):
        return [_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {k: v if k in _VALUES else _schema(v) for k, v in value.items() if v is not None or k in _VALUES}
