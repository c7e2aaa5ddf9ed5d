"""Rows as other tools write them: padded with nulls, dumped with every field, numbers from tables, arrays of rows."""

import io
import json

import pytest

from lorainit.config.events import Message
from lorainit.data.chat.template import Template
from lorainit.data.formats.file_report import check_file
from lorainit.data.formats.padding import remove_padding
from lorainit.data.formats.rows import Row, read_rows
from tests.lorainit.conftest import chat, make_tokenizer, write_rows
from tests.lorainit.contexts import prepared

USER = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": null}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWER = {"role": "tool", "tool_call_id": "c1", "content": "ok"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "default": None}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
PLAIN = {"messages": [USER, CALLING, ANSWER, REPLY], "tools": [TOOL]}


def padded(row):
    """What Arrow makes of a row: every struct of a column has the keys of all."""
    keys = {key for message in row["messages"] for key in message} | {"name", "weight", "function_call"}
    messages = [{key: message.get(key) for key in keys} for message in row["messages"]]
    call = {**CALL, "index": None, "function": {**CALL["function"], "strict": None}}
    messages[1]["tool_calls"] = [call]
    tool = json.loads(json.dumps(TOOL))
    tool["function"]["parameters"]["properties"]["b"] = None
    tool["function"]["parameters"]["properties"]["a"] |= {"description": None, "items": None}
    return {"messages": messages, "tools": [tool], "functions": None, "parallel_tool_calls": None, "prompt": None}


def report(*rows):
    return check_file(
        io.BytesIO(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    )


def values(path):
    return [row.value if isinstance(row, Row) else row.problems for row in read_rows(path)]


def test_row_padded_with_nulls_is_the_row_without_them(tmp_path):
    assert remove_padding(padded(PLAIN)) == PLAIN
    assert values(write_rows(tmp_path / "x", [padded(PLAIN)])) == values(write_rows(tmp_path / "y", [PLAIN]))


def test_row_of_one_kind_padded_with_anothers_keys_is_of_its_own_kind():
    assert report({"messages": None, "prompt": "p", "completion": "c"}).kind == "prompt_completion"
    assert report({**chat("q", "a"), "prompt": None, "completion": None}).kind == "chat"


def test_dumped_chat_completion_message_is_a_message():
    dumped = {**REPLY, "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    assert report({"messages": [USER, dumped]}).errors == []


def test_a_key_with_something_in_it_is_still_refused():
    (found,) = report({"messages": [USER, {**REPLY, "refusal": "No."}]}).errors
    assert (found.code, found.param) == ("message_unrecognized_key", "messages[1].refusal")


@pytest.mark.parametrize(("weight", "trained"), [(1.0, 1), (0.0, 0)])
def test_weight_from_a_table_of_numbers_is_a_weight(weight, trained, tmp_path):
    (value,) = values(write_rows(tmp_path / "x", [{"messages": [USER, {**REPLY, "weight": weight}, USER, REPLY]}]))
    found = value["messages"][1]["weight"]
    assert (found, type(found)) == (trained, int)


@pytest.mark.parametrize("weight", [0.5, True, "1", 2.0])
def test_weight_that_is_neither_0_nor_1_is_refused(weight):
    (found,) = report({"messages": [USER, {**REPLY, "weight": weight}]}).errors
    assert found.code == "invalid_weight"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "  \n ",
        "\u200b\ufeff",
        "\0",
        [{"type": "text", "text": ""}],
        [{"type": "text", "text": " "}, {"type": "text", "text": "\n"}],
    ],
)
def test_blank_answer_is_refused(content):
    (found,) = report({"messages": [USER, {"role": "assistant", "content": content}]}).errors
    assert (found.code, found.param) == ("missing_content", "messages[1].content")


def test_blank_completion_is_refused():
    (found,) = report({"prompt": "p", "completion": " \n"}).errors
    assert (found.code, found.param) == ("missing_content", "completion")


def test_blank_words_beside_a_call_are_no_fault():
    assert report({"messages": [USER, {**CALLING, "content": ""}, ANSWER, REPLY], "tools": [TOOL]}).errors == []


def test_key_written_twice_is_a_warning_with_its_line():
    row = b'{"messages": [{"role": "user", "content": "q", "content": "r"}, {"role": "assistant", "content": "a"}]}'
    found = [warning for warning in report(chat("x", "y"), row).warnings if warning.code == "duplicate_key"]
    assert [(warning.line, "'content'" in warning.message) for warning in found] == [(2, True)]


@pytest.mark.parametrize("indent", [None, 2])
def test_array_of_rows_is_said_to_be_one(indent):
    found = report(json.dumps([chat("q", "a"), chat("r", "b")], indent=indent).encode())
    assert (found.status, found.error_count) == ("error", 1)
    assert "one JSON array, and rows are JSON Lines" in found.errors[0].message


def test_lists_on_lines_of_their_own_are_bad_rows_one_by_one():
    found = report([chat("q", "a")], [chat("r", "b")])
    assert [(fault.line, fault.code) for fault in found.errors] == [(1, "data_type"), (2, "data_type")]
    assert "the row is a list" in found.errors[0].message


def test_row_of_instruction_input_and_output_is_no_preference_row():
    found = report({"instruction": "q", "input": "", "output": "a"})
    assert (found.kind, [fault.code for fault in found.errors]) == (None, ["missing_messages_list"])


def test_row_that_is_a_list_among_good_ones_is_one_bad_row():
    found = report([1], chat("q", "a"))
    assert [(fault.line, fault.code) for fault in found.errors] == [(1, "data_type")] and found.valid_rows == 1


def test_control_token_in_a_key_of_a_tools_schema_is_found():
    tokenizer = make_tokenizer()
    hidden = {"type": "object", "properties": {f"a{tokenizer.eos_token}": {"type": "string"}}}
    row = {"messages": [USER, REPLY], "tools": [{"type": "function", "function": {"name": "f", "parameters": hidden}}]}
    found = Template(tokenizer).control_token_fault(row, "")
    assert (found.code, found.param) == ("special_token_in_text", "tools[0].function.parameters.properties")


@pytest.mark.parametrize(("shared", "said"), [(5, [{"overlaps_validation_file": 5}]), (0, [])])
def test_validation_rows_that_are_trained_on_are_told(spec, tmp_path, shared, said):
    training = [chat(f"What is {i}?", "four") for i in range(5)]
    other = [chat(f"What is {i}?", "two") for i in range(5)]
    files = {"training": str(write_rows(tmp_path / "t", training)),
             "validation": str(write_rows(tmp_path / "v", training[:shared] + other))}  # fmt: skip
    events = []
    wanted = spec(data=files)
    prepared(wanted, tmp_path, events.append)
    found = [e for e in events if isinstance(e, Message) and "overlaps_validation_file" in e.data.get("warnings", {})]
    assert [e.data["warnings"] for e in found] == said and all(e.level == "warn" for e in found)
