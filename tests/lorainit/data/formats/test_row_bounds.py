"""What one hostile row costs: work that grows no faster than its size, a bounded report, and a fault for anything."""

import io
import json
import sys

import pytest

from lorainit.data.formats import rows as module
from lorainit.data.formats.file_report import check_file
from lorainit.data.formats.rows import read_rows
from lorainit.data.reader import load
from tests.lorainit.conftest import chat, make_tokenizer, write_rows

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def call(number):
    return {"id": f"c{number}", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def calling(number):
    return {"role": "assistant", "content": None, "tool_calls": [call(number)]}


SHAPES = {
    "functions answer": lambda n: {"messages": [USER, *n * [{"role": "function", "name": "f", "content": "x"}], REPLY]},
    "functions are called and answer": lambda n: {
        "messages": [USER]
        + n
        * [
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "x"},
        ]
        + [REPLY]
    },
    "tools answer": lambda n: {
        "messages": [USER]
        + [m for i in range(n) for m in (calling(i), {"role": "tool", "tool_call_id": f"c{i}", "content": "x"})]
        + [REPLY]
    },
    "one message calls": lambda n: {"messages": [USER, {**calling(0), "tool_calls": [call(i) for i in range(n)]}]},
    "turns": lambda n: {"messages": n * [USER, REPLY]},
    "parts": lambda n: {"messages": [{"role": "user", "content": n * [{"type": "text", "text": "x"}]}, REPLY]},
    "tools": lambda n: {"messages": [USER, REPLY], "tools": n * [{"type": "function", "function": {"name": "f"}}]},
    "numbers": lambda n: {"messages": n * [1]},
    "unknown keys": lambda n: {"messages": [{**USER, **{f"k{i}": 1 for i in range(n)}}]},
    "padding": lambda n: {"messages": [{**USER, **{f"k{i}": None for i in range(n)}}, REPLY]},
}


def operations(work):
    """How many instructions of Python `work` takes: the same number on every machine, however busy it is."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_twice_the_size_takes_no_more_than_twice_the_work(shape):
    small, large = (json.dumps(SHAPES[shape](n)).encode() for n in (100, 200))
    ratio = operations(lambda: check_file(io.BytesIO(large))) / operations(lambda: check_file(io.BytesIO(small)))
    assert ratio < 2.1


@pytest.mark.parametrize("count", [3, 500_000])
def test_faults_of_a_row_are_counted_up_to_a_limit_and_the_first_are_kept(count, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": count * [1]}))
    (row,) = read_rows(path)
    assert (len(row.problems), row.count) == ((3, 3) if count == 3 else (20, 1000))


def test_nobody_looks_for_more_faults_than_are_counted(monkeypatch):
    found, faults = [], module.find_faults
    monkeypatch.setattr(module, "find_faults", lambda *row: (found.append(1) or fault for fault in faults(*row)))
    report = check_file(io.BytesIO(json.dumps({"messages": 5000 * [1]}).encode()))
    assert (len(found), report.error_count, len(report.errors)) == (1000, 1000, 20)


def test_faults_of_many_rows_are_all_counted():
    report = check_file(io.BytesIO(b"1\n" * 50))
    assert (report.error_count, len(report.errors), report.rows) == (50, 20, 50)


def test_mixed_rows_are_told_however_late_they_come():
    rows = [b"1"] * 30 + [json.dumps(chat("q", "a")).encode(), b'{"prompt": "p", "completion": "c"}']
    report = check_file(io.BytesIO(b"\n".join(rows)))
    assert report.status == "error"
    assert report.status_details.startswith("the rows are of mixed kinds")


def test_a_problem_quotes_no_more_than_a_few_hundred_characters():
    (found,) = check_file(io.BytesIO(json.dumps({"messages": [{**USER, 100_000 * "k": 1}, REPLY]}).encode())).errors
    assert len(found.message) < 600 and len(found.param) <= 250


def test_values_nested_to_any_depth_are_a_fault_of_their_row():
    # One depth among these is read from JSON and is too deep for whatever is called next; which one, nobody knows.
    for depth in range(800, 1010):
        row = '{"messages": [{"role": %s, "content": "q"}]}' % ("[" * depth + "]" * depth)
        assert check_file(io.BytesIO(row.encode())).error_count == 1


def nested(depth):
    """A value of so many objects in one another."""
    return json.loads('{"a": ' * depth + "1" + "}" * depth)


def with_tool(schema):
    return {**chat("q", "a"), "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}


def with_arguments(arguments):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}


DEEP = {
    "a tool's schema": (lambda depth: with_tool(nested(depth - 4)), "invalid_json"),
    "a call's arguments": (lambda depth: with_arguments(json.dumps(nested(depth))), "invalid_tool_call"),
}


@pytest.mark.parametrize("where", DEEP)
def test_depth_of_a_row_has_a_bound(where):
    row, code = DEEP[where]
    found = check_file(io.BytesIO(b"\n".join(json.dumps(row(depth)).encode() for depth in (64, 65, 400))))
    assert [(fault.line, fault.code) for fault in found.errors] == [(2, code), (3, code)]
    assert "nested more than 64 deep" in found.errors[0].message


@pytest.mark.parametrize("where", DEEP)
def test_row_of_the_largest_depth_is_trained_and_one_too_deep_is_left_out(where, tmp_path):
    row, _ = DEEP[where]
    path = write_rows(tmp_path / "rows.jsonl", [row(64), row(400), chat("q", "a")])
    data = load(path, make_tokenizer(), max_length=4096, on_row_error="skip")
    assert ([sample.line for sample in data.samples], [fault.line for fault in data.problems]) == ([1, 3], [2])


@pytest.mark.parametrize("arguments", ['{"a": "\\ud800"}', '{"a": [{"\\udfff": 1}]}'])
def test_half_a_surrogate_pair_in_the_arguments_of_a_call_is_not_text(arguments):
    (found,) = check_file(io.BytesIO(json.dumps(with_arguments(arguments)).encode())).errors
    assert (found.code, found.param) == ("invalid_utf8", "messages[1].tool_calls[0]")


HALF = "\ud800"
CALLED = with_arguments("{}")["messages"]
HALVED = {
    "tool's name": {**chat("q", "a"), "tools": [{"type": "function", "function": {"name": HALF}}]},
    "schema's key": with_tool({"type": "object", "properties": {HALF: {}}}),
    "call's id": {"messages": [*CALLED, {"role": "tool", "tool_call_id": HALF, "content": "x"}, REPLY]},
    "deprecated call": {"messages": [USER, {**REPLY, "function_call": {"name": "f", "arguments": '"\\ud800"'}}]},
}


@pytest.mark.parametrize("where", HALVED)
def test_half_a_surrogate_pair_is_a_fault_wherever_it_is(where):
    (found,) = check_file(io.BytesIO(json.dumps(HALVED[where]).encode())).errors
    assert found.code == "invalid_utf8"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
def test_what_is_no_number_in_a_row_is_none_in_the_arguments_of_a_call(number):
    rows = [f'{{"prompt": {number}, "completion": "x"}}', json.dumps(with_arguments(f'{{"a": {number}}}'))]
    found = check_file(io.BytesIO("\n".join(rows).encode())).errors
    assert [fault.code for fault in found] == ["invalid_json", "invalid_tool_call"]


@pytest.mark.parametrize("arguments", ['{"a": 3, "a": 4}', '{"b": [{"a": 3, "a": 4}]}'])
def test_key_written_twice_in_arguments_is_a_warning(arguments):
    found = check_file(io.BytesIO(json.dumps(with_arguments(arguments)).encode()))
    assert [(w.line, "'a'" in w.message) for w in found.warnings if w.code == "duplicate_key"] == [(1, True)]


def test_what_is_said_of_a_row_can_be_stored_whatever_it_quotes():
    found = check_file(io.BytesIO(json.dumps({"messages": [{**USER, "\0": 1}, REPLY]}).encode()))
    assert "\0" not in found.model_dump_json() + found.errors[0].message + found.status_details
