"""One of two or more processes that run several specs in turn: `python -m tests.lorainit.pair RANK SIZE FOLDER`.

FOLDER/specs.json is {name: spec}, and FOLDER/whole.json names those that do more than train and check the download
(`only_training`). Each run leaves its files in FOLDER/name; each process writes what it found to
FOLDER/name/found-RANK.json: the error it ended by, and the bytes of the base that it held.
"""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from lorainit.config.errors import LorainitError
from lorainit.config.events import Message
from lorainit.config.spec import RunSpec
from lorainit.model import base
from lorainit.model.shard import local_bytes
from lorainit.run import run
from lorainit.runtime.distributed.launch import RENDEZVOUS, end_process
from tests.lorainit.conftest import only_training


def main() -> None:
    torch.set_num_threads(1)
    rank, size, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    os.environ |= {"RANK": rank, "WORLD_SIZE": size}
    held: list[int] = []
    place = base.Base.shard_copy

    def weighed(self, model, whole=()) -> None:
        place(self, model, whole)
        held.append(local_bytes(model))

    base.Base.shard_copy = weighed
    whole = json.loads((folder / "whole.json").read_text())
    for name, spec in json.loads((folder / "specs.json").read_text()).items():
        out = folder / name
        out.mkdir(exist_ok=True)
        os.environ[RENDEZVOUS] = str(out / "meeting")
        with nullcontext() if name in whole else only_training():
            error, messages = go(RunSpec.model_validate(spec), out)
        found = {"error": error, "held": held, "messages": messages}
        (out / f"found-{rank}.json").write_text(json.dumps(found))
        held.clear()


def go(spec: RunSpec, out: Path) -> tuple[str | None, list[str]]:
    """Run; the error's code and what was said."""
    messages: list[str] = []
    try:
        run(spec, out, lambda event: messages.extend([event.message] if isinstance(event, Message) else []))
    except LorainitError as error:
        return error.code, messages
    return None, messages


if __name__ == "__main__":
    main()
    end_process(0)
