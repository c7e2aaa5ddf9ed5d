"""Three unlike data sets for `bench_rates.py`, in short rows so that a run takes a minute. Loads no torch.

Grade-school maths (GSM8K, from a folder of the caller's), a message turned into JSON (`examples/`), and instructions
about prose: the docstrings of Python's standard library, to be recalled, corrected or named. The last one is made here
and never stored; it is the same on every machine with the same version of Python.
"""

import importlib
import inspect
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TRAINING_ROWS, HELD_OUT_ROWS = 128, 32
LONGEST = 320  # characters of a GSM8K question and its answer, or of a docstring: about 100 tokens
DATA_SETS = ("gsm8k", "examples", "instructions")
_MODULES = (
    "argparse", "ast", "bisect", "calendar", "collections", "configparser", "csv", "datetime", "decimal", "difflib",
    "email.message", "fractions", "functools", "heapq", "http.client", "inspect", "itertools", "json", "logging",
    "math", "os", "os.path", "pathlib", "random", "re", "shutil", "socket", "statistics", "string", "subprocess",
    "tarfile", "tempfile", "textwrap", "threading", "unittest", "urllib.parse", "urllib.request", "zipfile",
)  # fmt: skip


def write(name: str, folder: Path, *, gsm8k: Path | None) -> tuple[Path, Path]:
    """A data set's training and validation file, written to `folder`.

    Raises:
        ValueError: there are too few rows.
    """
    training, held_out = _rows(name, gsm8k)
    if len(training) < TRAINING_ROWS or len(held_out) < HELD_OUT_ROWS:
        raise ValueError(f"{name} has {len(training)} training rows and {len(held_out)} held-out ones: too few.")
    folder.mkdir(parents=True, exist_ok=True)
    pair = (folder / f"{name}.train.jsonl", folder / f"{name}.held-out.jsonl")
    for path, rows in zip(pair, (training[:TRAINING_ROWS], held_out[:HELD_OUT_ROWS]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pair


def _rows(name: str, gsm8k: Path | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if name == "gsm8k":
        if gsm8k is None:
            raise ValueError("Say where GSM8K's train.jsonl and test.jsonl are: --data FOLDER.")
        return read_maths(gsm8k / "train.jsonl"), read_maths(gsm8k / "test.jsonl")
    if name == "examples":
        return _lines(ROOT / "examples/train.jsonl"), _lines(ROOT / "examples/validation.jsonl")
    rows = instructions()
    return rows[HELD_OUT_ROWS:], rows[:HELD_OUT_ROWS]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_maths(path: Path) -> list[dict[str, Any]]:
    """The short problems of a file of GSM8K, as conversations."""
    pairs = ((row["question"], row["answer"]) for row in _lines(path))
    return [_chat(question, answer) for question, answer in pairs if len(question) + len(answer) <= LONGEST]


def instructions() -> list[dict[str, Any]]:
    """Three kinds of instructions in turn, each about another text, in an order that is always the same."""
    found = dict[str, str]()
    for module in _MODULES:
        found |= {name: text for name, text in _documented(module) if text not in found.values()}
    names = sorted(found)
    random.Random(20261128).shuffle(names)
    return [_chat(*_INSTRUCTIONS[i % len(_INSTRUCTIONS)](name, found[name])) for i, name in enumerate(names)]


def _explain(name: str, text: str) -> tuple[str, str]:
    return f"What does `{name}` do in Python?", text


def _correct(_name: str, text: str) -> tuple[str, str]:
    bare = "".join(letter for letter in text.lower() if letter.isalnum() or letter == " ")
    return f"Add the missing capitals and punctuation: {bare}", text


def _title(name: str, text: str) -> tuple[str, str]:
    return f"Which function of Python's standard library is this about?\n\n{text}", f"This is about `{name}`."


_INSTRUCTIONS = (_explain, _correct, _title)


def _documented(name: str) -> Iterator[tuple[str, str]]:
    module = importlib.import_module(name)
    for member in sorted(getattr(module, "__all__", [])):
        thing = getattr(module, member)
        text = " ".join((inspect.getdoc(thing) or "").split())
        if (
            (inspect.isroutine(thing) or inspect.isclass(thing))
            and 80 <= len(text) <= LONGEST
            and f"{member}(" not in text
        ):
            yield f"{name}.{member}", text


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
