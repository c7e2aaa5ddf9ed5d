"""Examines this machine as a run would see it, in another process, because this one loads no torch.

The worker does it before it uses a GPU again that has failed, and `lorainit doctor` does it for a person.
"""

import json
from collections.abc import Callable
from typing import Any

from api.core.devices.run_environment import PROGRAM, make_run_environment
from lorainit.system.bounded_command import run_command

ANSWER_SECONDS = 300.0  # torch may have to be read from a slow disk, and CUDA starts each GPU


class Unanswered(Exception):
    """The examination did not start or did not end; the message is a sentence."""


def examine(names: str | None, *, is_cancelled: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """The report of `python -m lorainit doctor --json`, whose `machine.gpu_trouble` says what is wrong with the GPUs.

    Args:
        names: as for `make_run_environment`.
        is_unwanted: called several times a second; the examination ends when it returns True.

    Raises:
        Unanswered: it did not start, or did not end within `ANSWER_SECONDS`.
    """
    answer = run_command(
        [*PROGRAM, "doctor", "--json"],
        seconds=ANSWER_SECONDS,
        environment=make_run_environment(names),
        is_cancelled=is_cancelled,
    )
    if answer is None:
        raise Unanswered(
            f"The examination of this machine has not ended after {ANSWER_SECONDS:.0f} seconds; a GPU may hang."
        )
    if answer.returncode:
        *_, last = answer.errors.strip().splitlines() or [
            "A run cannot start here."
        ]  # the last line of a traceback has the message
        raise Unanswered(last[:300])
    found: dict[str, Any] = json.loads(answer.output)
    return found
