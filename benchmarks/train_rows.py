"""The rows of `bench_train.py`, tokenized once by us for everybody. A process of its own: this loads torch.

    python benchmarks/train_rows.py DATA OUT ROWS SEED MAX_LENGTH CACHE

`OUT/train.jsonl` has the first ROWS usable rows of GSM8K's training file as chats, `OUT/rows.json` their token ids
and labels in the order in which our loop takes them, `OUT/held.json` the test rows; `OUT/valid.jsonl` and
`OUT/valid.json` have these rows whole; `OUT/base` is a link to SmolLM2.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_plan import HELD_OUT, SOURCE  # noqa: E402
from lorainit.data.batches import order_rows  # noqa: E402
from lorainit.data.dataset import Sample  # noqa: E402
from lorainit.data.reader import load  # noqa: E402
from lorainit.model.load import load_tokenizer, locate_base  # noqa: E402

TEST_ROWS = 200  # more than hold 4,096 trained tokens
IGNORED = -100  # the label that every trainer leaves out of its loss


def main(data: str, out: str, rows: str, seed: str, max_length: str, cache: str) -> None:
    base = locate_base(SOURCE, cache=Path(cache)).folder
    prepare(base, Path(data), Path(out), rows=int(rows), seed=int(seed), max_length=int(max_length))


def prepare(base: Path, data: Path, out: Path, *, rows: int, seed: int, max_length: int, held: int = HELD_OUT) -> None:
    """Everything of `OUT`, from a base's folder and a folder with questions and answers."""
    out.mkdir(parents=True)
    (out / "base").symlink_to(base.resolve())
    tokenizer = load_tokenizer(base)
    train = _usable(_chats(data / "train.jsonl"), out / "train.jsonl", tokenizer, rows=rows, length=max_length)
    taken = [train.samples[i] for i in order_rows(train, seed=seed, epoch=0)]
    (out / "rows.json").write_text(json.dumps([row(sample) for sample in taken]))
    chats = _chats(data / "test.jsonl")[:TEST_ROWS]
    tests = _write(out / "test.jsonl", chats)
    judged = load(tests, tokenizer, max_length=max_length, on_row_error="skip").samples
    kept = held_out([row(sample) for sample in judged], held)
    (out / "held.json").write_text(json.dumps(kept))
    # The same rows whole, for a run of ours to evaluate and for the judge of a rival's adapter (`train_quality`).
    whole = judged[: len(kept)]
    _write(out / "valid.jsonl", [chats[sample.line - 1] for sample in whole])
    (out / "valid.json").write_text(json.dumps([row(sample) for sample in whole]))


def _chats(path: Path) -> list[dict[str, Any]]:
    return [_chat(line) for line in path.read_text().splitlines()]


def _chat(line: str) -> dict[str, Any]:
    pair = json.loads(line)
    return {
        "messages": [
            {"role": "user", "content": pair["question"]},
            {"role": "assistant", "content": pair["answer"]},
        ]
    }


def _usable(chats: list[dict[str, Any]], path: Path, tokenizer: Any, *, rows: int, length: int) -> Any:
    """Exactly `rows` rows with something to learn from within `length` tokens, as a file and loaded."""
    found = load(_write(path, chats[: 2 * rows]), tokenizer, max_length=length, on_row_error="skip").samples[:rows]
    if len(found) < rows:
        raise SystemExit(f"The training file has {len(found)} usable rows, and {rows} are wanted.")
    return load(_write(path, [chats[sample.line - 1] for sample in found]), tokenizer, max_length=length)


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(sample: Sample) -> dict[str, list[int]]:
    """Token ids and labels; the first token has no prediction, so it is nobody's label."""
    ids, trained = sample.ids.tolist(), sample.trained.tolist()
    labels = [token if i and wanted else IGNORED for i, (token, wanted) in enumerate(zip(ids, trained, strict=True))]
    return {"input_ids": ids, "labels": labels}


def held_out(rows: list[dict[str, list[int]]], wanted: int) -> list[dict[str, list[int]]]:
    """The first rows with `wanted` labels in all; the last one loses what is too much.

    Raises:
        ValueError: the rows have fewer.
    """
    kept, left = [], wanted
    for row in rows:
        if not left:
            break
        labels = []
        for token in row["labels"]:
            take = token != IGNORED and left > 0
            left -= take
            labels.append(token if take else IGNORED)
        kept.append({"input_ids": row["input_ids"], "labels": labels})
    if left:
        raise ValueError(f"The test rows have {wanted - left} trained tokens, and {wanted} are wanted.")
    return kept


if __name__ == "__main__":
    main(*sys.argv[1:])
