"""Rows tokenized in a second, beside the least that anybody could do with the same template and tokenizer.

    python benchmarks/tokenize_rows.py [--rows 2000]

SmolLM2's, on one core. The least: each conversation is rendered once by transformers and all texts are tokenized in one
call, without a look at where the answers lie. Ours renders the prompt that a server sends as well (rows of several
answers a third time), bounds what a template may take, tokenizes answers by themselves and masks. By processor time.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in a worker's runs

from benchmarks.init_cases import SOURCE  # noqa: E402
from lorainit.data import reader  # noqa: E402
from lorainit.model.load import load_tokenizer, locate_base  # noqa: E402

ROUNDS = 3


def rows(count: int, answers: int) -> list[dict[str, Any]]:
    """The example's rows again and again, no two of them the same, with so many answers each."""
    known = [json.loads(line) for line in (ROOT / "examples" / "train.jsonl").read_text().splitlines()]
    found = []
    for number in range(count):
        system, user, answer = known[number % len(known)]["messages"]
        asked = {**user, "content": f"{user['content']} {number}"}
        found.append({"messages": [system, *answers * [asked, answer]]})
    return found


def seconds(action: Callable[[], object]) -> float:
    """The least of some rounds."""
    times = []
    for _ in range(ROUNDS):
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
    return min(times)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    count = parser.parse_args().rows
    print("| rows | the least, rows/s | ours | times the least | one row at a time |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as place:
        folder = locate_base(SOURCE, cache=Path(place)).folder
        tokenizer = load_tokenizer(folder)
        for answers in (1, 3):
            made, path = rows(count // answers, answers), Path(place) / "rows.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in made))

            def least(made: list[dict[str, Any]] = made) -> None:
                texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in made]
                tokenizer(texts, add_special_tokens=False)

            def ours(path: Path = path) -> None:
                reader.tokenize(path, tokenizer, max_length=2048, folder=folder)

            bare, whole = seconds(least), seconds(ours)
            together, reader.TOGETHER_ROWS = reader.TOGETHER_ROWS, 1
            single = seconds(ours)
            reader.TOGETHER_ROWS = together
            speeds = [f"{len(made) / taken:.0f}" for taken in (bare, whole, single)]
            name = f"{answers} answer{'s' * (answers > 1)}"
            print(f"| {name} | {speeds[0]} | {speeds[1]} | {whole / bare:.1f} | {speeds[2]} |", flush=True)


if __name__ == "__main__":
    main()
