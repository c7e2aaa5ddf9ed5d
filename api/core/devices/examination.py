"""What a run would find on this machine, asked of a process of its own: this one loads no torch.

The worker asks before it gives a GPU that has failed another job, and `lorainit doctor` asks for a person.
"""

import json
from collections.abc import Callable
from typing import Any

from api.core.devices.run_environment import PROGRAM, environment_of_runs
from lorainit.system.bounded_command import run_command

ANSWER_SECONDS = 300.0  # torch may have to be read from a slow disk, and CUDA starts each GPU


class Unanswered(Exception):
    """A run could not even begin here; the message is a sentence."""


def examine(names: str | None, *, is_cancelled: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """The report of `python -m lorainit doctor --json`, whose `machine.gpu_trouble` says what is wrong with the GPUs.

    Args:
        names: as for `environment_of_runs`.
        is_unwanted: asked several times a second; if it says so, the examination ends.

    Raises:
        Unanswered: it could not begin, or nothing was found within `ANSWER_SECONDS`.
    """
    answer = run_command(
        [*PROGRAM, "doctor", "--json"],
        seconds=ANSWER_SECONDS,
        environment=environment_of_runs(names),
        is_cancelled=is_cancelled,
    )
    if answer is None:
        raise Unanswered(
            f"The examination of this machine has not ended after {ANSWER_SECONDS:.0f} seconds; a GPU may hang."
        )
    if answer.returncode:
        *_, last = answer.errors.strip().splitlines() or ["A run cannot start here."]  # of a traceback, what it says
        raise Unanswered(last[:300])
    found: dict[str, Any] = json.loads(answer.output)
    return found
