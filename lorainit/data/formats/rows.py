"""Reads the rows of a JSONL training file, each with its line number: valid rows in one format, others with faults.

The file is read as a stream, because it may be larger than memory. The formats of a row are in `conversation`. Does not
import torch.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict

from lorainit.data.formats import strict_json
from lorainit.data.formats.conversation import PREFERENCE_KEYS, Fault, Kind, find_faults, find_warnings, shows_nothing
from lorainit.data.formats.padding import remove_padding

MAX_LINE_BYTES = 8 * 1024 * 1024
KEPT_PROBLEMS = 20
# At most so many faults of a row are counted. A line of 8 MB can have four million, and counting all of them would take
# as long as checking a large file.
COUNTED_IN_A_ROW = 1000
# Characters of a problem's message and place. They are limited, because a quoted key may be as long as its line.
LONGEST_TEXT, LONGEST_PLACE = 500, 250
# Duplicates are found among the first so many rows only, so that their digests take no more than about 50 MB.
DUPLICATE_WINDOW = 500_000
_PLAIN_ROLES = ("user", "assistant", "system")
_ARRAY = Fault(
    "invalid_json",
    None,
    "the file is one JSON array, and rows are JSON Lines: one object a line, without the array's brackets and commas.",
)
_NO_KIND = Fault(
    "missing_messages_list",
    "messages",
    "messages is missing: a row has messages, or prompt and completion.",
)


class Problem(BaseModel):
    """One error or warning. `line` counts from 1; None if it is about the whole file."""

    model_config = ConfigDict(frozen=True)

    line: int | None
    code: str
    param: str | None
    message: str


@dataclass(frozen=True)
class Row:
    """A valid row.

    `value`: from `scan`, the line's object without the null keys that mean nothing (`padding`); from `read_rows`, that
    object in the one format of `normalize`.
    """

    line: int
    kind: Kind
    value: dict[str, Any]
    warnings: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its first problems, and how many there are (at most 1,000 are counted)."""

    line: int
    problems: tuple[Problem, ...]
    count: int = 1


def make_problem(line: int, fault: Fault) -> Problem:
    """The problem that a fault of a row is: with its line, and cut to a limited length."""
    text = f"Line {line}: {_shortened(fault.text, LONGEST_TEXT)}"
    place = fault.param and _shortened(fault.param, LONGEST_PLACE)
    return Problem(line=line, code=fault.code, param=place, message=text)


def _shortened(text: str, most: int) -> str:
    text = text.replace("\0", "\N{SYMBOL FOR NULL}")  # because PostgreSQL cannot store a null character in a text
    return text if len(text) <= most else f"{text[: most - 1]}…"


def read_rows(path: str | Path) -> Iterator[Row | BadRow]:
    """The rows of a JSONL file in order, valid ones normalized. Blank lines are skipped, but have a line number."""
    with Path(path).open("rb") as stream:
        for row in scan(stream):
            yield replace(row, value=normalize(row.value, row.kind)) if isinstance(row, Row) else row


@dataclass
class Seen:
    """What is known from the rows so far and matters for those that follow.

    `kind`: the kind of the first row that names one. `mixed`: a later row was of another kind. `digests`: of the rows,
    to find duplicates. `messages_left`: for how many more problems a message is made; the caller lowers it as it keeps
    them.
    """

    kind: Kind | None = None
    mixed: bool = False
    digests: set[bytes] = field(default_factory=set)
    messages_left: int = KEPT_PROBLEMS


def scan(stream: BinaryIO, seen: Seen | None = None) -> Iterator[Row | BadRow]:
    """The rows of a stream in the format that they were written in, without the null keys that mean nothing.

    The first row that names a kind decides the kind of the file.
    """
    seen = seen or Seen()
    lines = _lines(stream)
    opening = list(islice(lines, 2))
    if opening and opening[0][1] and _opens_an_array(opening[0][1], alone=len(opening) == 1):
        yield _make_bad_row(opening[0][0], iter((_ARRAY,)), seen)
        return  # otherwise each line of the array would be reported as an error of its own
    for line, raw in chain(opening, lines):
        doubled = list[str]()
        row = _parse(raw, doubled)
        if isinstance(row, dict):
            kind = kind_of(row)
            seen.kind = seen.kind or kind
            yield _check_row(line, row, kind, seen, raw or b"", doubled)
        else:
            yield _make_bad_row(line, iter((row,)), seen)


def _make_bad_row(line: int, found: Iterator[Fault], seen: Seen) -> BadRow:
    """A row with these faults. No message is made beyond `seen.messages_left`, because nobody would see it."""
    kept = tuple(make_problem(line, fault) for fault in islice(found, seen.messages_left))
    return BadRow(line, kept, len(kept) + sum(1 for _ in islice(found, COUNTED_IN_A_ROW - len(kept))))


def _check_row(
    line: int, row: dict[str, Any], kind: Kind | None, seen: Seen, raw: bytes, doubled: list[str]
) -> Row | BadRow:
    if kind is None:
        return _make_bad_row(line, iter((_NO_KIND,)), seen)
    if kind != seen.kind:
        seen.mixed = True
        return _make_bad_row(
            line, iter((Fault("mixed_formats", None, f"this is a {kind} row in a {seen.kind} file."),)), seen
        )
    notes = list[Problem]()
    if doubled or not is_plain(row):
        found = find_faults(row, kind)
        if (first := next(found, None)) is not None:
            return _make_bad_row(line, chain((first,), found), seen)
        notes += [make_problem(line, fault) for fault in find_warnings(row, kind, doubled)]
    digest = blake2b(raw.strip(), digest_size=8).digest()
    if digest in seen.digests:
        notes.append(make_problem(line, Fault("duplicate_row", None, "the same row appears earlier in the file.")))
    elif len(seen.digests) < DUPLICATE_WINDOW:
        seen.digests.add(digest)
    return Row(line, kind, row, tuple(notes))


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, bytes without line end) of non-blank lines; None instead of a line that is too long.

    Such a line is read in parts that are dropped, so that no line takes more memory than the limit.
    """
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 2):
        number += 1
        complete = raw.endswith(b"\n")
        text = raw.rstrip(b"\r\n")
        if number == 1:
            text = text.removeprefix(b"\xef\xbb\xbf")
        if len(text) > MAX_LINE_BYTES:
            yield number, None
        elif text.strip():
            yield number, text
        while not complete and (rest := stream.readline(MAX_LINE_BYTES)):
            complete = rest.endswith(b"\n")


def _opens_an_array(raw: bytes, *, alone: bool) -> bool:
    """Whether the first line begins a JSON array of rows, on one line or over several.

    If the line is a complete array and not the only line, the file has an array on each line. Then each of them is
    reported as a bad row.
    """
    if not raw.lstrip().startswith(b"["):
        return False
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        return True
    return alone and bool(row) and isinstance(row[0], dict)


def _parse(raw: bytes | None, doubled: list[str]) -> dict[str, Any] | Fault:
    """One row without its padding. The first key that one of its objects has twice is added to `doubled`."""
    if raw is None:
        return Fault("line_too_long", None, f"the line is longer than {MAX_LINE_BYTES} bytes.")
    try:
        row = strict_json.read(raw, doubled)
    except UnicodeDecodeError as error:
        return Fault("invalid_utf8", None, f"byte {error.start + 1} of the line is not UTF-8.")
    except strict_json.Unreadable as error:
        return Fault(error.code, None, str(error))
    if not isinstance(row, dict):
        what = "a list, and a row is an object" if isinstance(row, list) else "not an object"
        return Fault("data_type", None, f"the row is {what}.")
    return remove_padding(row) if b"null" in raw or b"[]" in raw else row


# --- the kind of a row --------------------------------------------------------------------------


def kind_of(row: dict[str, Any]) -> Kind | None:
    """The kind of a row by its keys; None if they name none."""
    if "messages" in row:
        return "chat"
    # `input` counts only if it is an object, because other formats have a text there (instruction, input, output).
    if (PREFERENCE_KEYS - {"input"}) & row.keys() or isinstance(row.get("input"), dict):
        return "preference"
    return "prompt_completion" if {"prompt", "completion"} & row.keys() else None


def is_plain(row: dict[str, Any]) -> bool:
    """Whether the row is a chat of plain texts that ends with an answer. Such a row has no fault and no warning.

    Most rows are like this, so a fast check that skips all others saves most of the time (docs/decisions/0042). False
    does not mean that the row has a fault.
    """
    messages = row.get("messages")
    if len(row) != 1 or type(messages) is not list or not messages:
        return False
    for message in messages:
        if type(message) is not dict or len(message) != 2:
            return False
        role, content = message.get("role"), message.get("content")
        if type(role) is not str or role not in _PLAIN_ROLES or type(content) is not str:
            return False
        if role == "assistant" and not content[:1].isalnum() and shows_nothing(content):
            return False
    return bool(messages[-1]["role"] == "assistant")


# --- normalization -----------------------------------------------------------------------------


def normalize(row: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """A valid row in the one format that the chat templates get.

    Chat becomes `{"messages", "tools"[, "parallel_tool_calls"]}`. Contents are strings, or None beside tool calls. The
    role `developer` becomes `system`. Call arguments are parsed, because chat templates expect objects. The deprecated
    `functions`, `function_call` and role `function` become tools and tool calls.
    """
    if kind == "prompt_completion":
        return {"prompt": row["prompt"], "completion": row["completion"]}
    if kind == "preference":
        return row
    tools = [*row.get("tools", []), *({"type": "function", "function": f} for f in row.get("functions", []))]
    # The id of each function's last call, so that an answer finds it without a search through all earlier messages.
    last_call: dict[str, str] = {}
    messages = [_normalized_message(message, f"call_{i}", last_call) for i, message in enumerate(row["messages"])]
    parallel = {"parallel_tool_calls": row["parallel_tool_calls"]} if "parallel_tool_calls" in row else {}
    return {"messages": messages, "tools": tools, **parallel}


def _normalized_message(message: dict[str, Any], name: str, last_call: dict[str, str]) -> dict[str, Any]:
    role, content = message["role"], message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    out = {**message, "role": "system" if role == "developer" else role, "content": content}
    if "weight" in out:
        out["weight"] = int(out["weight"])
    calls = list(message.get("tool_calls") or [])
    if function := out.pop("function_call", None):
        calls.append({"id": name, "type": "function", "function": function})
    if calls:
        out["tool_calls"] = [{**c, "function": _parsed(c["function"])} for c in calls]
        last_call |= {c["function"]["name"]: c["id"] for c in calls}
    if role == "function":
        out |= {"role": "tool", "tool_call_id": last_call.get(message.get("name", ""), name)}
    return out


def _parsed(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": strict_json.read(function["arguments"], [])}
