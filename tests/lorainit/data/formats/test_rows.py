import io
import json

import pytest

from lorainit.data.formats import rows as module
from lorainit.data.formats.file_report import check_file
from lorainit.data.formats.rows import BadRow, read_rows
from tests.lorainit.conftest import chat

GOOD = chat("Hi", "Hello")
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def report(*rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    return check_file(io.BytesIO(b"\n".join(lines) + b"\n"))


def messages(*them):
    return {"messages": list(them)}


USER = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "a"}

BAD = {
    "data_type": ([1], None),
    "missing_messages_list": ({"messages": []}, "messages"),
    "message_missing_key": (messages({"content": "q"}, REPLY), "messages[0].role"),
    "message_unrecognized_key": (messages({**USER, "mood": "x"}, REPLY), "messages[0].mood"),
    "unrecognized_role": (messages({"role": "bot", "content": "q"}, REPLY), "messages[0].role"),
    "missing_content": (messages(USER, {"role": "assistant", "content": None}), "messages[1].content"),
    "example_missing_assistant_message": (messages(USER), "messages"),
    "invalid_json": (b'{"messages": ', None),
    "invalid_utf8": (b'{"messages": "\xff"}', None),
    "mixed_formats": ({"prompt": "p", "completion": "c"}, None),
    "invalid_weight": (messages(USER, {**REPLY, "weight": 2}), "messages[1].weight"),
    "invalid_tool_call": (messages(USER, {**REPLY, "tool_calls": [{"id": "c1"}]}), "messages[1].tool_calls[0]"),
    "tool_call_not_found": (
        messages(USER, {"role": "tool", "content": "x", "tool_call_id": "c9"}, REPLY),
        "messages[1].tool_call_id",
    ),
    "unsupported_content_type": (
        messages({"role": "user", "content": [{"type": "image_url"}]}, REPLY),
        "messages[0].content[0].type",
    ),
    "no_trainable_tokens": (messages(USER, {**REPLY, "weight": 0}), "messages"),
}


@pytest.mark.parametrize("code", BAD)
def test_bad_row_is_reported_with_its_code_line_and_place(code):
    row, param = BAD[code]
    found = report(GOOD, b"", row, chat("x", "y"))
    assert [(e.code, e.line, e.param) for e in found.errors] == [(code, 3, param)]
    assert found.errors[0].message.startswith("Line 3: ")
    assert (found.rows, found.valid_rows, found.error_count) == (3, 2, 1)


def test_line_too_long_is_skipped_without_being_held_in_memory(monkeypatch):
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 200)
    found = report(GOOD, chat("x", "y" * 1000), chat("x", "z"))
    assert [(e.code, e.line) for e in found.errors] == [("line_too_long", 2)]
    assert found.valid_rows == 2


def test_line_of_exactly_the_limit_is_read(monkeypatch):
    monkeypatch.setattr(module, "MAX_LINE_BYTES", len(json.dumps(GOOD)))
    assert report(GOOD).valid_rows == 1


def test_preference_row_without_an_output_is_reported():
    good = {"input": messages(USER), "preferred_output": [REPLY], "non_preferred_output": [REPLY]}
    bad = {"input": messages(USER), "preferred_output": [REPLY]}
    found = report(good, bad)
    assert found.kind == "preference"
    assert [(e.code, e.line, e.param) for e in found.errors] == [("missing_preference", 2, "non_preferred_output")]
    assert "identical_preferences" in {w.code for w in found.warnings}


def test_report_dumps_exactly_the_validation_object():
    found = report(GOOD, messages(USER, {"role": "assistant", "content": None}))
    assert found.model_dump() == {
        "kind": "chat",
        "rows": 2,
        "valid_rows": 1,
        "error_count": 1,
        "warning_count": 1,
        "errors": [
            {
                "line": 2,
                "code": "missing_content",
                "param": "messages[1].content",
                "message": "Line 2: messages[1].content is null, but the message has no tool_calls.",
            }
        ],
        "warnings": [{"line": None, "code": "few_rows", "param": None, "message": "The file has only 2 rows."}],
    }
    assert (found.status, found.status_details) == (
        "processed",
        "1 of 2 rows are invalid; first: line 2: missing_content: messages[1].content is null, but the message has no"
        " tool_calls",
    )


def test_clean_file_has_no_details():
    found = report(*(chat(f"q{i}", "a") for i in range(10)))
    assert (found.status, found.status_details, found.warning_count) == ("processed", None, 0)


@pytest.mark.parametrize(
    ("data", "details"),
    [
        (b"", "the file has no rows"),
        (b"\n\n", "the file has no rows"),
        (
            b"\xff\xfe\x00",
            "1 of 1 row is invalid; first: line 1: invalid_utf8: byte 1 of the line is not UTF-8",
        ),
        (
            json.dumps([GOOD]).encode(),
            "1 of 1 row is invalid; first: line 1: invalid_json: the file is one JSON array, and rows are JSON Lines:"
            " one object a line, without the array's brackets and commas",
        ),
        (
            json.dumps(GOOD).encode() + b'\n{"prompt": "p", "completion": "c"}',
            "the rows are of mixed kinds; first: line 2: mixed_formats: this is a prompt_completion row in a chat file",
        ),
    ],
)
def test_unusable_file_is_an_error_with_a_sentence(data, details):
    found = check_file(io.BytesIO(data))
    assert (found.status, found.status_details) == ("error", details)


def test_all_errors_are_counted_and_the_first_twenty_kept():
    found = report(*([b"{"] * 30))
    assert (found.error_count, len(found.errors), found.errors[-1].line) == (30, 20, 20)


def test_byte_order_mark_crlf_and_blank_lines_keep_line_numbers():
    text = (
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps(chat("x", "y")).encode() + b"\r\n{}\r\n"
    )
    found = check_file(io.BytesIO(text))
    assert found.valid_rows == 2
    assert [e.line for e in found.errors] == [4]


def test_duplicates_are_counted():
    found = report(GOOD, chat("x", "y"), GOOD)
    assert found.duplicates == 1
    assert next((w.line, w.code) for w in found.warnings) == (3, "duplicate_row")


def test_one_row_shows_everything_wrong_with_it():
    found = report(messages({"role": "bot", "content": "x"}, {"role": "user", "content": 3}))
    assert {e.code for e in found.errors} == {"unrecognized_role", "data_type"}


@pytest.mark.parametrize("text", [b'{"prompt": NaN}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_hostile_json_is_a_row_error(text):
    assert report(text).errors[0].code == "invalid_json"


def test_half_a_surrogate_pair_is_not_text():
    assert report(b'{"prompt": "\\ud800", "completion": "x"}').errors[0].code == "invalid_utf8"


def test_rows_are_normalized(tmp_path):
    value = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            USER,
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
            {"role": "function", "name": "f", "content": "7"},
            REPLY,
            USER,
        ],
        "functions": [{"name": "f"}],
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(value))
    (row,) = read_rows(path)
    assert {w.code for w in row.warnings} == {"deprecated_functions", "trailing_messages_dropped"}
    system, _, call, answer, *_ = row.value["messages"]
    assert (system["role"], system["content"]) == ("system", "ab")
    assert call["tool_calls"] == [
        {"id": "call_2", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ]
    assert (answer["role"], answer["tool_call_id"]) == ("tool", "call_2")
    assert row.value["tools"] == [{"type": "function", "function": {"name": "f"}}]


def test_reading_yields_bad_rows_in_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n{\n" + json.dumps(GOOD))
    assert [(r.line, isinstance(r, BadRow)) for r in read_rows(path)] == [(1, False), (2, True), (3, False)]


def test_tool_call_with_its_answer_is_valid():
    row = messages(
        USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"}, REPLY,
    )  # fmt: skip
    assert report(row).error_count == 0
