"""`lorainit doctor` asks one other process about the devices, and nobody who may never answer without a limit."""

import io
import json
from typing import Any

import pytest
from rich.console import Console

from api.cli import doctor
from api.core.devices import devices, examination
from api.core.devices.examination import Unanswered
from lorainit.system.bounded_command import CommandResult
from tests.conftest import forget

pytestmark = [pytest.mark.usefixtures("service"), pytest.mark.one_database]

CHOICE = {"name": "threads", "value": "2", "why": "there are two"}
FACTS: dict[str, Any] = {"platform": "Linux", "usable_cpus": 2, "cpus": 2, "memory_bytes": 2**30, "gpus": []}
FACTS |= {"gpu": None, "gpu_trouble": None, "cuda": None, "driver": None}
FOUND = {"machine": FACTS, "packages": {"torch": "2.13.0"}, "choices": [CHOICE]}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Which GPUs an examination was given; it finds a machine without any."""
    names = list[str | None]()

    def examine(name: str | None) -> dict[str, Any]:
        names.append(name)
        return FOUND

    monkeypatch.setattr(doctor, "examine", examine)
    return names


def printed(*, as_json: bool = False) -> tuple[bool, str]:
    out = io.StringIO()
    is_well = doctor.run(Console(file=out, width=400), as_json=as_json)
    return is_well, out.getvalue()


def test_one_examination_is_told_in_words(asked: list[str | None]) -> None:
    is_well, text = printed()
    assert (is_well, len(asked)) == (True, 1)
    assert "devices: no GPU; runs go to the CPU" in text
    assert "threads          2: there are two" in text


def test_one_examination_is_told_to_programs(asked: list[str | None]) -> None:
    report = json.loads(printed(as_json=True)[1])
    assert (report["ok"], report["machine"], len(asked)) == (True, FACTS, 1)


def test_a_driver_that_hangs_fails_and_nothing_else_is_asked_of_it(
    asked: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "find_silence", lambda: "The NVIDIA driver hangs.")
    is_well, text = printed()
    assert (is_well, asked) == (False, [])
    assert "failed  devices: The NVIDIA driver hangs." in text


def test_an_examination_without_an_answer_fails_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_names: str | None) -> None:
        raise Unanswered("It does not answer.")

    monkeypatch.setattr(doctor, "examine", fail)
    is_well, text = printed()
    assert not is_well
    assert "failed  devices: It does not answer." in text


def test_of_a_traceback_the_last_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = (
        'Traceback (most recent call last):\n  File "doctor.py", line 213, in examine\nRuntimeError: It is broken.\n'
    )
    monkeypatch.setattr(examination, "run_command", lambda *_, **__: CommandResult(1, "", errors))
    with pytest.raises(Unanswered, match=r"^RuntimeError: It is broken\.$"):
        examination.examine(None)


def test_what_keeps_a_worker_here_from_taking_jobs_fails(
    asked: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "find_problem", lambda slots: f"{slots} is too many.")
    assert "failed  devices: 1 is too many." in printed()[1]


def test_where_the_worker_is_for_the_processor_no_gpu_is_looked_at(
    asked: list[str | None], environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("LORAINIT_WORKER_DEVICE", "cpu")
    forget()
    assert "devices: LORAINIT_WORKER_DEVICE is cpu; runs go to the CPU" in printed()[1]
    assert asked == [""]


def test_settings_that_cannot_be_read_are_told_once(asked: list[str | None], environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LORAINIT_PORT", "abc")
    forget()
    is_well, text = printed()
    assert (is_well, asked, text.count("LORAINIT_PORT")) == (False, [], 1)
