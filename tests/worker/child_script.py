"""What scripts in the child's place can say: the protocol of a run, for one member or several.

members[i].spec, .out, .lease   paths from the command line
members[i].name                 the spec's seed, by which a test tells its jobs apart
say(i, kind=..., ...)           an event
step(i, n), checkpoint(i, n), done(i), failed(i)
held(i)                         whether the lease file is still there and not past
until(condition)                wait for it, ten seconds at most
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_arguments = sys.argv[1:]
_fd = int(_arguments[_arguments.index("--events-fd") + 1])


class Member:
    def __init__(self, spec: str, out: str, lease: str) -> None:
        self.spec, self.out, self.lease = Path(spec), Path(out), Path(lease)

    @property
    def name(self) -> int:
        return int(json.loads(self.spec.read_text())["seed"])


members = [Member(_arguments[0], _arguments[1], _arguments[_arguments.index("--lease") + 1])]
members += [Member(*_arguments[n + 1 : n + 4]) for n, word in enumerate(_arguments) if word == "--member"]


def say(member: int, **event: Any) -> None:
    os.write(_fd, json.dumps({**event, "member": member}).encode() + b"\n")


def step(member: int, number: int, *, total: int = 10) -> None:
    """A step whose loss is the job's name, so that a mixed-up row shows."""
    loss = float(members[member].name)
    say(member, kind="metrics", step=number, total_steps=total, epoch=0.1, tokens=5, seconds=0.1, train_loss=loss)


def shown(member: int, number: int) -> None:
    step(member, number)
    say(member, kind="stage", stage="training", message="Training")


def _adapter(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(text)
    return folder


def checkpoint(member: int, number: int) -> None:
    folder = members[member].out / f"step-{number}"
    _adapter(folder / "adapter", str(members[member].name))
    (folder / "state.json").write_text("{}")
    say(member, kind="checkpoint", step=number, path=str(folder), metrics={"step": number})


def done(member: int) -> None:
    folder = _adapter(members[member].out / "adapter", str(members[member].name))
    check = {"passed": True, "format": "peft", "export_rank": 16}
    say(member, kind="done", adapter=str(folder), trained_tokens=members[member].name, export_check=check, resources={})


def failed(member: int, code: str = "non_finite_loss", *, may_pass: bool = False) -> None:
    message = f"{code} of {members[member].name}."
    say(member, kind="failed", code=code, message=message, param=None, may_pass=may_pass)


def held(member: int) -> bool:
    try:
        return time.monotonic() < float(members[member].lease.read_text())
    except (OSError, ValueError):
        return False


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(99)
        time.sleep(0.01)
