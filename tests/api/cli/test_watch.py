"""Following a job: a server that was never there, one that goes away, and a job that nobody takes."""

import io
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from openai import APIConnectionError, OpenAI
from openai.types.fine_tuning import FineTuningJob
from rich.console import Console

from api.cli import watch as watching

AWAY = APIConnectionError(request=httpx2.Request("GET", "http://127.0.0.1:9/v1"))


def job(status: str = "queued", **fields: Any) -> FineTuningJob:
    return FineTuningJob.model_construct(id="ftjob-1", status=status, model="tiny", **fields)


def follow(answers: list[FineTuningJob | Exception], monkeypatch: pytest.MonkeyPatch) -> str:
    """What is printed while a server gives these answers, polled one second apart."""
    clock: Iterator[int] = iter(range(10_000))
    left = iter(answers)

    def retrieve(_: OpenAI, __: str) -> FineTuningJob:
        answer = next(left)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(watching, "retrieve", retrieve)
    monkeypatch.setattr(watching, "find_events_after", lambda *_: [])
    monkeypatch.setattr(watching.time, "sleep", lambda _: None)
    monkeypatch.setattr(watching.time, "monotonic", lambda: float(next(clock)))
    console = Console(file=io.StringIO(), emoji=False, markup=False, soft_wrap=True)
    try:
        watching.watch(OpenAI(base_url="http://127.0.0.1:9/v1", api_key="x"), "ftjob-1", console)
    finally:
        assert isinstance(console.file, io.StringIO)
        follow.printed = console.file.getvalue()  # type: ignore[attr-defined]
    return console.file.getvalue()


def test_a_server_that_was_never_there_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(APIConnectionError):
        follow([AWAY, job("succeeded")], monkeypatch)


def test_a_server_that_goes_away_is_waited_for_and_said_to_be_away(monkeypatch: pytest.MonkeyPatch) -> None:
    said = follow([job(), AWAY, AWAY, AWAY, job("succeeded")], monkeypatch)
    assert [line.split(" (")[0] for line in said.splitlines()] == ["The server is away", "The server is back."]


def test_a_server_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(APIConnectionError):
        follow([job(), *[AWAY] * 500], monkeypatch)


def test_a_job_that_nobody_takes_is_said_to_wait_for_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = job(queue_reason="no_worker_for_device", resources={"device": "gpu"})
    said = follow([waits, waits, waits, job("succeeded")], monkeypatch)
    assert said.count("Waiting: no worker that is up takes jobs for the device 'gpu'") == 1


def test_a_reason_that_is_gone_at_the_next_look_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    first = job(queue_reason="waiting_for_gpu", queue_position=1)
    assert follow([first, job("running"), job("succeeded")], monkeypatch) == ""


@pytest.mark.parametrize(("position", "words"), [(2, "number 2"), (100, "number 100"), (101, "behind the first 100")])
def test_a_place_is_a_number_as_far_as_the_server_counts(position: int, words: str) -> None:
    from api.core.queue import positions

    assert watching.PLACES_COUNTED == positions.MOST
    waits = job(queue_reason="waiting_for_turn", queue_position=position)
    assert watching.explain_wait(waits) == f"it is {words} in the queue"


def test_every_reason_to_wait_has_words() -> None:
    from api.core.queue import positions

    source = positions._make_position.__code__.co_consts
    reasons = {text for text in source if isinstance(text, str) and "_" in text and " " not in text} | {"restarting"}
    assert reasons == set(watching.WAITING)
