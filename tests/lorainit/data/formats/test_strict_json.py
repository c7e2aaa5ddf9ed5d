"""Reading what somebody sent: the fast parser and Python's own find the same, in values, warnings and words."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorainit.data.formats import strict_json
from lorainit.data.formats.conversation import find_faults, find_warnings
from lorainit.data.formats.rows import is_plain

CORNERS = [
    "18446744073709551615", "18446744073709551616", "-9223372036854775808", "-9223372036854775809", "9" * 30,
    "1" * 5000, "[9223372036854775807, 9223372036854775808.0, -9.3e18]", '{"a": 123456789012345678901234567890}',
    "1" * 25 + ".0", "1e400", "-1e400", "1e-400", "1E5", "0.1", "-0", "-0.0", "1.0000000000000000000000000000001",
    "9.9999999999999999e22", "NaN", "[Infinity]", "-Infinity", "01", "1.", ".5", "+1", "0x1", "[1,]", '{"a":1,}',
    "[1 2]", "'a'", "tru", "", " ", "\ufeff{}", "{} {}", "{}\x00", '"\x7f"', '"\x1f"', '"\\x41"', '"\\u00"',
    "\u00a0{}", "// {}\n{}", r'"\ud800"', r'["\udc00"]', r'{"\ud800": 1}', r'"\ud83d\ude00"', r'"\ud83d\u0041"',
    r'"\u0000"', '{"a":1,"a":2}', '{"a" : 1, "a":2}', '{"a"\t:1,"a":2}', '[{"b":1},{"a":1,"a":{"a":1,"a":2}}]',
    '{"a":1,"\\u0061":2}', r'{"a":1,"a":"\u0022\u0022"}', r'{"a":"\u0022"}', r'{"a":"x\\","a":"y\\"}',
    r'{"a":"{\"b\":1,\"b\":2}"}', '{"":1,"":2}', "[" * 64 + "]" * 64, "[" * 65 + "]" * 65,
    '{"a":' * 64 + "1" + "}" * 64, '{"a":' * 65 + "1" + "}" * 65, "[" * 5000 + "]" * 5000, "[" * 5000, "[[],{}]", "1",
    '"a"', "null", "true",
]  # fmt: skip


def outcome(read: Any, text: str | bytes) -> tuple[str, str, list[str]]:
    """What came of reading; the representation tells 1 from 1.0 and True."""
    doubled = list[str]()
    try:
        return "value", repr(read(text, doubled)), doubled
    except strict_json.Unreadable as error:
        return error.code, str(error), doubled
    except UnicodeDecodeError as error:
        return "bytes", str(error.start), doubled


def require_alike(text: str) -> None:
    assert outcome(strict_json.read, text) == outcome(strict_json._read_closely, text)
    assert outcome(strict_json.read, text.encode()) == outcome(strict_json._read_closely, text)


@pytest.mark.parametrize("text", CORNERS, ids=range(len(CORNERS)))
def test_both_parsers_find_the_same(text: str) -> None:
    require_alike(text)


@pytest.mark.parametrize(
    "text", [b'"\xff"', b'{"a": "\xed\xa0\x80"}', b"\xc0\x80", b'"caf\xc3"', b"\xff\xfe{\x00}\x00"]
)
def test_bytes_that_are_no_text_are_told_by_their_place(text: bytes) -> None:
    assert outcome(strict_json.read, text) == outcome(strict_json._read_closely, text)
    assert outcome(strict_json.read, text)[0] == "bytes"


def test_an_ordinary_text_is_read_by_the_fast_parser_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "_read_closely", None)
    text = json.dumps({"messages": [{"role": "user", "content": 'She said: "a": {"b" : 1}\\'}], "n": [1, 1.5, None]})
    assert strict_json.read(text.encode(), []) == json.loads(text)


def test_a_long_text_is_read_by_the_parser_that_survives_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "orjson", None)
    assert len(strict_json.read(b"[" + b"1," * (1 << 20) + b"1]", [])) == (1 << 20) + 1


@st.composite
def written(draw: st.DrawFn, depth: int = 0) -> str:
    """JSON as all kinds of programs write it, now and then with a key twice or something that is no JSON."""
    kind = draw(st.sampled_from(["object", "list", "text", "number", "odd"] if depth < 3 else ["text", "number"]))
    space = draw(st.sampled_from(["", " ", "\t", "\r"]))
    if kind == "object":
        keys = draw(st.lists(st.sampled_from(["a", "b", '"', "\\", "a:", "é"]), max_size=3))
        pairs = (json.dumps(key) + space + ":" + draw(written(depth + 1)) for key in keys)
        return "{" + f"{space},".join(pairs) + "}"
    if kind == "list":
        return "[" + f",{space}".join(draw(st.lists(written(depth + 1), max_size=3))) + "]"
    if kind == "text":
        text = json.dumps(draw(st.text('ab":\\ é\U0001f600', max_size=6)), ensure_ascii=draw(st.booleans()))
        return text.replace('\\"', "\\u0022") if draw(st.booleans()) else text
    if kind == "number":
        return repr(draw(st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)))
    return draw(st.sampled_from(["NaN", "null", '"\\ud800"', "1e999", "", "}", '"']))


@settings(deadline=None, max_examples=400)
@given(written())
def test_both_parsers_find_the_same_in_whatever_is_written(text: str) -> None:
    require_alike(text)


MESSAGES = st.dictionaries(
    st.sampled_from(["role", "content", "weight", "name"]),
    st.sampled_from(["user", "assistant", "system", "tool", "developer", "", " ", "\u200b", "a", "-", 1, None, ["a"]]),
    min_size=1,
    max_size=3,
)
PLAIN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": st.text(max_size=2)}
)


@settings(deadline=None, max_examples=400)
@given(st.lists(PLAIN | MESSAGES, max_size=4) | st.none(), st.sampled_from([{}, {"tools": []}, {"extra": 1}]))
def test_a_plain_row_has_no_fault_and_no_warning(messages: list[dict[str, Any]] | None, more: dict[str, Any]) -> None:
    row = {"messages": messages, **more}
    assert not is_plain(row) or [*find_faults(row, "chat"), *find_warnings(row, "chat")] == []


def test_rows_that_most_files_are_made_of_are_plain() -> None:
    for line in ("system", "user"):
        assert is_plain({"messages": [{"role": line, "content": ""}, {"role": "assistant", "content": "{}"}]})
