"""The count of sentences that give a reason."""

import pytest

from tests.comments import Counts, count


def test_a_sentence_with_a_reason_is_counted_once() -> None:
    assert count("# Locked first, because others write it. Then read.\nx = 1\n") == Counts(2, 2, 1)


def test_a_comment_of_two_lines_is_one_text() -> None:
    assert count("# Locked first,\n# so that others wait.\nx = 1\n") == Counts(3, 1, 1)


def test_docstrings_count_and_strings_do_not() -> None:
    source = '"""A module.\n\nSo it waits.\n"""\nx = "because"\n'
    assert count(source) == Counts(4, 2, 1)


@pytest.mark.parametrize("directive", ["# noqa: E501  (because)", "# type: ignore[misc]"])
def test_what_a_tool_reads_is_no_sentence(directive: str) -> None:
    assert count(f"x = 1  {directive}\n") == Counts(1, 0, 0)
