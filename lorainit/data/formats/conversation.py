"""The formats of one row of a training file: chat, prompt and completion, preference.

Each check is a generator of faults, so that all faults of a row are reported at once. Does not import torch.
"""

import json
import unicodedata
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from lorainit.data.formats import strict_json

Kind = Literal["chat", "prompt_completion", "preference"]

ROLES = ("system", "developer", "user", "assistant", "tool")
_CHAT_KEYS = {"messages", "tools", "parallel_tool_calls", "functions"}
PREFERENCE_KEYS = {"input", "preferred_output", "non_preferred_output"}
_UNSEEN = {"Cc", "Cf", "Zl", "Zp", "Zs"}  # categories of Unicode
_MESSAGE_KEYS = {"role", "content", "name", "weight", "tool_calls", "tool_call_id", "function_call"}


class Fault(NamedTuple):
    """One fault of a row: its code (docs/errors.md), its place in the row, and a sentence about it."""

    code: str
    param: str | None
    text: str


def find_faults(row: dict[str, Any], kind: Kind) -> Iterator[Fault]:
    """All faults of a row of this kind that can be found without a tokenizer."""
    check = {"chat": _chat, "prompt_completion": _prompt_completion, "preference": _preference}[kind]
    return check(row)


def find_warnings(row: dict[str, Any], kind: Kind, doubled: Sequence[str] = ()) -> Iterator[Fault]:
    """Warnings about a valid row. `doubled`: keys that one of its objects has twice."""
    messages = row["messages"] if kind == "chat" else []
    if key := next(iter([*doubled, *_doubled_arguments(messages)]), None):
        text = f"the key {key[:80]!r} is written twice in one object, and the last one counts."
        yield Fault("duplicate_key", None, text)
    if kind == "preference" and row["preferred_output"] == row["non_preferred_output"]:
        yield Fault("identical_preferences", None, "both outputs are the same, so the row teaches nothing.")
    if kind != "chat":
        return
    if "functions" in row or any("function_call" in m or m["role"] == "function" for m in messages):
        yield Fault("deprecated_functions", None, "functions and function_call are deprecated; converted to tools.")
    last = max(i for i, m in enumerate(messages) if is_trained(m))
    if last + 1 < len(messages):
        text = f"the {len(messages) - last - 1} messages after the last trained turn are not used."
        yield Fault("trailing_messages_dropped", f"messages[{last + 1}]", text)


def _doubled_arguments(messages: list[dict[str, Any]]) -> list[str]:
    """The first key that an object in the arguments of a tool call has twice, if there is one."""
    found = list[str]()
    for message in messages:
        functions = [call["function"] for call in message.get("tool_calls") or ()]
        for function in [*functions, *filter(None, [message.get("function_call")])]:
            strict_json.read(function["arguments"], found)
    return found


def is_trained(message: dict[str, Any]) -> bool:
    """Whether this message is trained: an assistant message whose weight is not 0."""
    return bool(message["role"] == "assistant" and message.get("weight", 1) != 0)


# --- checks ------------------------------------------------------------------------------------


def _chat(row: dict[str, Any]) -> Iterator[Fault]:
    for key in sorted(row.keys() - _CHAT_KEYS):
        yield Fault("message_unrecognized_key", key, f"'{key}' is not a key of a chat row.")
    yield from _tools(row)
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        yield Fault("missing_messages_list", "messages", "messages is not a list of at least one message.")
        return
    if (yield from _messages(messages, "messages")):
        return
    if not any(m["role"] == "assistant" for m in messages):
        yield Fault("example_missing_assistant_message", "messages", "no message has the role assistant.")
    elif not any(is_trained(m) for m in messages):
        yield Fault("no_trainable_tokens", "messages", "every assistant message has weight 0.")


def _prompt_completion(row: dict[str, Any]) -> Iterator[Fault]:
    for key in sorted(row.keys() - {"prompt", "completion"}):
        yield Fault("message_unrecognized_key", key, f"'{key}' is not a key of a prompt and completion row.")
    for key in ("prompt", "completion"):
        if key not in row:
            yield Fault("message_missing_key", key, f"{key} is missing.")
        elif not isinstance(row[key], str):
            yield Fault("data_type", key, f"{key} is not a string.")
    if isinstance(row.get("completion"), str) and shows_nothing(row["completion"]):
        yield Fault("missing_content", "completion", "completion is blank.")


def _preference(row: dict[str, Any]) -> Iterator[Fault]:
    for key in sorted(row.keys() - PREFERENCE_KEYS):
        yield Fault("message_unrecognized_key", key, f"'{key}' is not a key of a preference row.")
    start = row.get("input")
    if not isinstance(start, dict) or not isinstance(start.get("messages"), list) or not start["messages"]:
        yield Fault("missing_messages_list", "input.messages", "input.messages is not a list of at least one message.")
    else:
        faulty = yield from _messages(start["messages"], "input.messages")
        if not faulty and start["messages"][-1]["role"] not in ("user", "tool"):
            last = f"input.messages[{len(start['messages']) - 1}].role"
            yield Fault("unrecognized_role", last, "the last message of input is neither user nor tool.")
    for key in ("preferred_output", "non_preferred_output"):
        yield from _output(row.get(key), key)


def _output(output: Any, key: str) -> Iterator[Fault]:
    if not isinstance(output, list) or len(output) != 1:
        yield Fault("missing_preference", key, f"{key} is not a list of exactly one message.")
        return
    faulty = yield from _messages(output, key)
    if not faulty and output[0]["role"] != "assistant":
        yield Fault("unrecognized_role", f"{key}[0].role", f"the message of {key} is not an assistant message.")


def _messages(messages: list[Any], at: str) -> Generator[Fault, None, bool]:
    """Yield the faults of all messages, and return whether there are any.

    They are not collected in a list, because a row can have millions of them.
    """
    called: set[str] = set()
    faulty = False
    for index, message in enumerate(messages):
        where = f"{at}[{index}]"
        if not isinstance(message, dict):
            faulty = True
            yield Fault("data_type", where, f"{where} is not an object.")
            continue
        for fault in _message(message, where, called):
            faulty = True
            yield fault
        calls = message.get("tool_calls")
        called |= {c["id"] for c in calls if _is_call(c)} if isinstance(calls, list) else set()
    return faulty


def _message(message: dict[str, Any], where: str, called: set[str]) -> Iterator[Fault]:
    for key in sorted(message.keys() - _MESSAGE_KEYS):
        yield Fault("message_unrecognized_key", f"{where}.{key}", f"'{key}' is not a key of a message.")
    role = message.get("role")
    if "role" not in message:
        yield Fault("message_missing_key", f"{where}.role", f"{where}.role is missing.")
        return
    if role not in ROLES and role != "function":
        text = f"role {json.dumps(role)[:80]} is not one of {', '.join(ROLES)}.".replace('"', "'")
        yield Fault("unrecognized_role", f"{where}.role", text)
        return
    yield from _content(message, where)
    yield from _extras(message, where)
    if role == "tool":
        yield from _answer(message, where, called)
    if "tool_calls" in message or "function_call" in message:
        yield from _calls(message, where)


def _content(message: dict[str, Any], where: str) -> Iterator[Fault]:
    place, content = f"{where}.content", message.get("content")
    calls = message["role"] == "assistant" and (message.get("tool_calls") or message.get("function_call"))
    if content is None and not calls:
        if "content" not in message:
            yield Fault("message_missing_key", place, f"{place} is missing.")
        else:
            yield Fault("missing_content", place, f"{place} is null, but the message has no tool_calls.")
    elif isinstance(content, list) and not content:
        yield Fault("missing_content", place, f"{place} is an empty list.")
    elif content is not None and not isinstance(content, str | list):
        yield Fault("data_type", place, f"{place} is neither a string nor a list of text parts.")
    elif message["role"] == "assistant" and not calls and _is_blank(content):
        yield Fault("missing_content", place, f"{place} is blank, and the message has no tool_calls.")
    if isinstance(content, list):
        for index, part in enumerate(content):
            yield from _part(part, f"{place}[{index}]")


def _is_blank(content: str | list[Any] | None) -> bool:
    """Whether a text, or each of its parts, shows nothing. False if a part is faulty, since that is reported anyway."""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        return all(isinstance(text, str) and shows_nothing(text) for text in texts)
    return shows_nothing(content or "")


def shows_nothing(text: str) -> bool:
    """Whether the text has only white space, control characters and characters without width."""
    return all(unicodedata.category(character) in _UNSEEN for character in text)


def _part(part: Any, place: str) -> Iterator[Fault]:
    if not isinstance(part, dict):
        yield Fault("data_type", place, f"{place} is not an object.")
    elif part.get("type") != "text":
        kind = json.dumps(part.get("type"))[:80].replace('"', "'")
        yield Fault("unsupported_content_type", f"{place}.type", f"content of type {kind} is not text.")
    elif not isinstance(part.get("text"), str):
        yield Fault("data_type", f"{place}.text", f"{place}.text is not a string.")


def _extras(message: dict[str, Any], where: str) -> Iterator[Fault]:
    if "name" in message and not isinstance(message["name"], str):
        yield Fault("data_type", f"{where}.name", f"{where}.name is not a string.")
    if "weight" in message:
        weight = message["weight"]
        if message["role"] != "assistant":
            yield Fault("invalid_weight", f"{where}.weight", "weight is only for assistant messages.")
        # Floats are accepted, because tools such as pandas turn a column of 1 and null into 1.0. `type` and not
        # `isinstance`, because True is an int in Python.
        elif type(weight) not in (int, float) or weight not in (0, 1):
            yield Fault("invalid_weight", f"{where}.weight", f"{where}.weight is neither 0 nor 1.")


def _answer(message: dict[str, Any], where: str, called: set[str]) -> Iterator[Fault]:
    place, name = f"{where}.tool_call_id", message.get("tool_call_id")
    if name is None:
        yield Fault("message_missing_key", place, f"{place} is missing.")
    elif not isinstance(name, str) or name not in called:
        yield Fault("tool_call_not_found", place, f"{place} names no earlier tool call.")


def _calls(message: dict[str, Any], where: str) -> Iterator[Fault]:
    if message["role"] != "assistant":
        yield Fault("invalid_tool_call", where, "only assistant messages can call tools.")
        return
    if "function_call" in message:
        yield from _function(message["function_call"], f"{where}.function_call", needs="needs a name")
    calls = message.get("tool_calls", [{}] if "function_call" not in message else None)
    if calls is None:
        return
    if not isinstance(calls, list) or not calls:
        yield Fault("invalid_tool_call", f"{where}.tool_calls", f"{where}.tool_calls is not a list of calls.")
        return
    for index, call in enumerate(calls):
        # Nothing of an invalid call is checked further, so that it has one fault and not several.
        function = call.get("function") if _is_call(call) else None
        needs = "needs id, type 'function' and function with a name"
        yield from _function(function, f"{where}.tool_calls[{index}]", needs=needs)


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("id"), str) and call.get("type") == "function"


def _function(function: Any, place: str, *, needs: str) -> Iterator[Fault]:
    name, arguments = (function.get(k) if isinstance(function, dict) else None for k in ("name", "arguments"))
    if not name or not isinstance(name, str) or not isinstance(arguments, str):
        text = f"{place} {needs} and arguments that are a string holding JSON."
        yield Fault("invalid_tool_call", place, text)
        return
    try:
        strict_json.read(arguments, [])
    except strict_json.Unreadable as error:
        code = error.code if error.code == "invalid_utf8" else "invalid_tool_call"
        yield Fault(code, place, f"the arguments of {place} cannot be used: {error}")


def _tools(row: dict[str, Any]) -> Iterator[Fault]:
    if not isinstance(row.get("parallel_tool_calls", True), bool):
        yield Fault("data_type", "parallel_tool_calls", "parallel_tool_calls is not a boolean.")
    for key in ("tools", "functions"):
        if not isinstance(row.get(key, []), list):
            yield Fault("data_type", key, f"{key} is not a list.")
            continue
        for index, tool in enumerate(row.get(key, [])):
            function = tool.get("function") if key == "tools" and isinstance(tool, dict) else tool
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                yield Fault("data_type", f"{key}[{index}]", f"{key}[{index}] does not describe a function with a name.")
