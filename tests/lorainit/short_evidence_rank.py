"""One of the processes of a run, one of which lacks memory once while evidence is collected: `... RANK SIZE FOLDER`.

FOLDER/spec.json is what is run, FOLDER/short.json says in which process and pass memory runs out; what each process did
about it is in FOLDER/RANK.json.
"""

import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from lorainit.config.spec import RunSpec
from lorainit.init.collectors import gradients, inputs, preheat
from lorainit.run import run
from lorainit.runtime.distributed.launch import RENDEZVOUS, end_process
from tests.lorainit.shortage import told

PASSES = {"eva": (inputs, "logits_of"), "lora_ga": (gradients, "backward"), "hrp": (preheat, "forward_backward")}


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), RENDEZVOUS: str(folder / "rendezvous")}
    short, calls = json.loads((folder / "short.json").read_text()), itertools.count(1)
    module, name = PASSES[short["method"]]
    forward = getattr(module, name)

    def short_once(*args, **named):
        if next(calls) == short["call"] and rank == short["rank"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(*args, **named)

    heard = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, short_once)
        run(RunSpec.model_validate_json((folder / "spec.json").read_text()), folder / "shared", heard.append)
    (folder / f"{rank}.json").write_text(json.dumps(told(heard)))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    end_process(0)
