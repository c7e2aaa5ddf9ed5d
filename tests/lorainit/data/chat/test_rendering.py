"""Chat templates come with models and are programs: none runs for ever, fills the memory or the disk."""

import threading
import time

import pytest

from lorainit.config.errors import UnsupportedModel
from lorainit.data.chat import rendering
from lorainit.data.chat.rendering import RenderLimitExceeded
from lorainit.data.chat.template import Rendered, Template
from lorainit.data.formats.conversation import Fault
from tests.lorainit.conftest import PLAIN_TEMPLATE, TEMPLATE, make_tokenizer

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": []}
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FILTER_LOOP = "{% set x = lipsum(n=1000000000) %}"
DOUBLING = "{% set ns = namespace(s='abcdefgh') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
REPEATED = "{{ 'a' * 100000000000 }}"
LONG = "{{ 'a' * 40000000 }}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(rendering, "_LOOK_SECONDS", 0.05)


@pytest.mark.parametrize("source", [LOOP, FILTER_LOOP])
def test_template_that_runs_for_ever_is_ended(source: str, impatient: None) -> None:
    template = Template(make_tokenizer(source))
    started = time.monotonic()
    with pytest.raises(RenderLimitExceeded, match="takes more than 0 s for one conversation"):
        template.render(ROW)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("source", [DOUBLING, REPEATED])
def test_template_that_fills_the_memory_is_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MAX_BYTES", 64 << 20)
    with pytest.raises(RenderLimitExceeded, match="takes more than 64 MiB for one conversation"):
        Template(make_tokenizer(source)).render(ROW)


def test_text_of_a_template_is_bounded() -> None:
    with pytest.raises(RenderLimitExceeded, match="makes a text of 40000000 characters"):
        Template(make_tokenizer(LONG)).render(ROW)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 10 ** 10 ** 9 }}", "takes powers"),
        ("{% set n = 10 %}{{ (n) ** n ** n }}", "takes powers"),
        ("{{ 1.5 | round(1000000000, 'floor') }}", "rounds numbers"),
        ("a" * (2 << 20), "has 2097152 characters"),
    ],
)
def test_what_could_not_be_ended_is_not_begun(source: str, text: str) -> None:
    with pytest.raises(RenderLimitExceeded, match=text):
        Template(make_tokenizer(source)).render(ROW)


def test_words_and_two_stars_as_arguments_are_no_powers() -> None:
    rendering.check_source("{{ f(**m) }} ** round {{ dict(a=1, **m) }} {# 2 ** 3 #}")


@pytest.mark.parametrize("source", [TEMPLATE, PLAIN_TEMPLATE])
def test_honest_templates_pass_the_check(source: str) -> None:
    Template(make_tokenizer(source)).check()


@pytest.mark.parametrize(
    "source", ["{{ 1 // 0 }}", "{{ messages[7].content.x }}", "{% for %}", "{{ " + "(" * 5000 + ")" * 5000 + " }}"]
)
def test_whatever_a_template_raises_is_the_fault_of_a_row(source: str) -> None:
    fault = Template(make_tokenizer(source)).render(ROW)
    assert isinstance(fault, Fault)
    assert fault.code == "template_error" and "cannot render the conversation" in fault.text


def test_template_that_breaks_a_bound_at_one_row_breaks_it_at_that_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MAX_CHARACTERS", 1000)
    template = Template(make_tokenizer("{% if messages | length > 2 %}" + LONG + "{% endif %}" + PLAIN_TEMPLATE))
    long = {**ROW, "messages": ROW["messages"] * 2}
    fault = template.render(long)
    assert isinstance(fault, Fault) and "makes a text of" in fault.text
    assert isinstance(template.render(ROW), Rendered)
    assert isinstance(template.render(long), Fault)
    with pytest.raises(RenderLimitExceeded):  # each costs up to ten seconds, so it is not tried at a thousand rows
        template.render(long)


@pytest.mark.parametrize(
    "source", ["{{ ''.__class__.__mro__[1] }}", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{{ 1 // 0 }}"]
)
def test_the_check_refuses_a_template_that_renders_no_conversation(source: str) -> None:
    with pytest.raises(UnsupportedModel, match="cannot render the conversation"):
        Template(make_tokenizer(source)).check()


def test_the_check_finds_a_template_that_runs_for_ever_only_with_tools(impatient: None) -> None:
    template = Template(make_tokenizer("{% if tools %}" + LOOP + "{% endif %}" + PLAIN_TEMPLATE))
    with pytest.raises(RenderLimitExceeded):
        template.check()


def test_renderings_of_other_threads_go_on_when_one_is_ended(impatient: None) -> None:
    slow, quick = Template(make_tokenizer(LOOP)), Template(make_tokenizer(PLAIN_TEMPLATE))
    ends: list[object] = []

    def run() -> None:
        try:
            slow.render(ROW)
        except RenderLimitExceeded as error:
            ends.append(error)

    other = threading.Thread(target=run)
    other.start()
    for _ in range(50):
        quick.render(ROW)
    other.join(30)
    assert len(ends) == 1
    quick.render(ROW)
