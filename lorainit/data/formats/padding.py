"""Rows as other tools write them: keys that are null because another row has them, as Arrow pads columns, or because a
library dumped an object with all its fields. Such keys are as absent. Torch-free; judges nothing.
"""

from typing import Any

# Null is something a caller may have meant here, and what is wrong with it is said in its own words.
_MEANT = {"role", "content"}
# Of a JSON schema, where null can be a value. Anywhere else in a schema it is none that JSON Schema knows.
_VALUES = {"default", "const", "enum", "examples"}
# Lists that say nothing when they are empty: what a dumped message has of them.
_EMPTY = {"tool_calls", "annotations"}


def without_padding(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the keys that are null, in its messages, calls and tools too; `row` itself is left alone."""
    row = _filled(row)
    for key in ("messages", "preferred_output", "non_preferred_output"):
        if isinstance(row.get(key), list):
            row[key] = [_message(message) for message in row[key]]
    for key in ("tools", "functions"):
        if isinstance(row.get(key), list):
            row[key] = [_schema(tool) for tool in row[key]]
    if isinstance(row.get("input"), dict):
        row["input"] = without_padding(row["input"])
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
