"""One of the processes of a run of which the last has little memory from step 2 on: `... RANK SIZE FOLDER`.

FOLDER/spec.json is what is run, in FOLDER/shared; what each process did about it is in FOLDER/RANK.json.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from lorainit.config.spec import RunSpec
from lorainit.run import run
from lorainit.runtime.distributed.launch import RENDEZVOUS, end_process
from tests.lorainit.shortage import PLENTY, Memory, after, told, until_export

LIMIT = 60  # tokens


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), RENDEZVOUS: str(folder / "rendezvous")}
    with pytest.MonkeyPatch.context() as patch:
        memory, heard = Memory(patch), []
        limit = LIMIT if rank == size - 1 else PLENTY
        listener = until_export(memory, after(1, memory, heard, limit=limit, looking=limit))
        run(RunSpec.model_validate_json((folder / "spec.json").read_text()), folder / "shared", listener)
    (folder / f"{rank}.json").write_text(json.dumps(told(heard)))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    end_process(0)
