"""One download of every initialization, as a run leaves it, on bases that old readers can read too."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorainit.config.inits import INITS
from lorainit.config.spec import RunSpec
from lorainit.model.source import tokenizer_files
from lorainit.run import run
from tests.lorainit.conftest import chat, make_tokenizer, only_training, tiny_gpt2, tiny_llama, write_rows
from tests.readers import arithmetic, read_peft
from tests.readers.environments import python_of
from tests.zoo import bases as zoo

HERE = Path(__file__).parent
IDS = [5, 40, 77, 130, 9, 201, 33, 64, 250, 3, 17, 99, 141, 280, 8, 51]
SMALL: dict[str, dict[str, Any]] = {
    "lora_ga": {"samples": 4},
    "lora_one": {"samples": 4},
    "eva": {"samples": 4},
    "corda": {"samples": 4},
    "hrp": {"preheat_rank": 8, "preheat_steps": 4},
}


def _asked(method: str, base: str = "llama", **lora: Any) -> tuple[str, dict[str, Any]]:
    return base, {"init": {"method": method, **SMALL.get(method, {}), **lora.pop("init", {})}, "r": 4, **lora}


CASES = {
    **{method: _asked(method) for method in INITS if method != "loftq"},
    "loftq": _asked("loftq", quantization="nf4"),
    # Trained at alpha/sqrt(r), the default of lora_one; written as an alpha that is no integer.
    "lora_one-r6": _asked("lora_one", r=6),
    "eva-pattern": _asked("eva", init={"export_ranks": "pattern"}),
    "kaiming-dora": _asked("kaiming", use_dora=True),
    "kaiming-gpt2": _asked("kaiming", "gpt2"),
    "pissa-gpt2": _asked("pissa", "gpt2"),
    "kaiming-dora-gpt2": _asked("kaiming", "gpt2", use_dora=True),
}
# Of the slow tier: their files have the form of kaiming's or of pissa's, whatever the numbers in them.
SLOW = {"gaussian", "orthogonal", "hrp", "milora", "olora", "loram", "corda", "lora_ga"}
USUAL = [name for name in CASES if name not in SLOW]
# On experts and attention: only few readers take these. PiSSA's download is of rank 2r.
MIXTURES = {
    kind: _asked("pissa", kind, target_modules=["q_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj"])
    for kind in ("mixtral", "qwen3_moe", "gpt_oss")
}
# What readers of plain LoRA with one rank read: every initialization, on Llama.
PLAIN = [
    name for name, (base, lora) in CASES.items() if base == "llama" and "dora" not in name and "pattern" not in name
]


def slowly(names: Iterable[str]) -> list[Any]:
    """Cases by name, those of the slow tier marked."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


def same_tier(name: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that run when `name` does: so many downloads are trained and read, and no others."""
    return [other for other in names if (other in SLOW) == (name in SLOW)]


@dataclass(frozen=True)
class Download:
    """A folder that a run left behind, the base it belongs to, and the logits it must give on `IDS`."""

    base: Path
    folder: Path
    expected: torch.Tensor
    untouched: torch.Tensor


@pytest.fixture(scope="session")
def reader_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wide enough for NF4, with a tokenizer as transformers 4 has it and a rope base where transformers 4 looks."""
    folders = {}
    for name, model in {"llama": tiny_llama(64, 128), "gpt2": tiny_gpt2(64)}.items():
        folders[name] = tmp_path_factory.mktemp("base") / name
        model.save_pretrained(folders[name])
        tokenizer_files.write(make_tokenizer(), folders[name])
    folders |= {kind: zoo.make(kind, tmp_path_factory.mktemp("base") / kind) for kind in MIXTURES}
    path = folders["llama"] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 10000.0}))
    return folders


@pytest.fixture(scope="session")
def download(reader_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Download]:
    """The download of a case by name, trained when it is first asked for."""
    words = ["the", "cat", "sat", "on", "two", "mats", "and", "it", "is", "four", "my", "friend", "so", "what"]
    rows = [chat(f"What is {w}?", " ".join(words[: 2 + i])) for i, w in enumerate(words[:12])]
    data = write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", rows)
    made: dict[str, Download] = {}

    def make(name: str) -> Download:
        base, lora = (CASES | MIXTURES)[name]
        folder = tmp_path_factory.mktemp(name)
        recipe = {"max_steps": 6, "batch_size": 4, "learning_rate": 5e-2, "warmup_ratio": 0.0}
        value = {
            "model": {"id": base, "source": str(reader_bases[base]), "root": f"tests/{base}", "max_length": 256},
            "data": {"training": str(data), "validation": None},
            "lora": lora,
            "training": recipe,
        }
        with only_training():
            run(RunSpec.model_validate(value), folder, lambda event: None)
        adapter, plain = folder / "adapter", reader_bases[base]
        expected = arithmetic.logits(plain, IDS, (adapter, 1.0))
        return Download(plain, adapter, expected, arithmetic.logits(plain, IDS))

    def found(name: str) -> Download:
        if name not in made:
            made[name] = make(name)
        return made[name]

    return found


def peft_logits(reader: str | None, cases: dict[str, Download], out: Path) -> dict[str, torch.Tensor]:
    """Logits of these downloads by the PEFT of this environment, in a process of its own; by ours (None), in this one.

    That ours reads a download in a new process, too, tests/test_job_path.py asks.
    """
    asked = {name: [str(one.base), str(one.folder)] for name, one in cases.items()}
    wanted = {"cases": asked, "ids": IDS, "out": str(out)}
    if reader is None:
        read_peft.read(wanted)
    else:
        ask(reader, "read_peft.py", wanted)
    return load_file(out)


def ask(reader: str | None, script: str, asked: dict[str, Any]) -> str:
    """What a reading program of this folder prints in this environment (None = ours)."""
    command = [str(sys.executable if reader is None else python_of(reader)), str(HERE / script)]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
