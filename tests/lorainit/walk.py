"""Which files of the library a row passes on its way to its loss, found by looking at every call of one small run.

`python -m tests.lorainit.walk` prints them in order, with the functions that are handed a row. A file counts if one of
its functions is given or returns a row while the training file is read, or from the beginning of the training to the
first step's loss. A row is here a text that contains what a message of the file says, the value that a line of the file
stands for, a `Row`, `Sample` or `Batch`, a list of these, or a `Dataset`. Hidden states and lists of token ids are no
rows: the modules of the model and the parts of a loss are not counted.
"""

import json
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import lorainit.run as library
from lorainit.config.errors import Stopped
from lorainit.config.events import Event, Metrics
from lorainit.config.spec import RunSpec
from lorainit.data.batches import Batch
from lorainit.data.dataset import Dataset, Sample
from lorainit.data.formats.rows import BadRow, Row
from lorainit.data.reader import Encoded, _Draft
from tests.lorainit.conftest import chat, make_tokenizer, tiny_llama, write_rows

ROOT = f"{Path(library.__file__).parent}/"
ROWS = (Row, BadRow, Sample, Batch, Dataset, _Draft, Encoded)
BEGINS, ENDS = (
    ("load_cached", "train"),
    ("load_cached", "forward_backward"),
)  # functions between which a row is followed


class Walk:
    """A profile function that follows something through the calls of a program.

    `found`: the functions that were given or have returned it, by file, in the order of their first call.

    Args:
        root: the folder that files are named in, with a slash at its end.
        folders: those of its folders whose files count.
        is_followed: whether a value is what is followed.
        begins, ends: functions between which it is followed; () = from the beginning, to the end.
    """

    def __init__(
        self,
        root: str,
        is_followed: Callable[[Any], bool],
        *,
        folders: Collection[str] = ("",),
        begins: Collection[str] = (),
        ends: Collection[str] = (),
    ) -> None:
        self.found: dict[str, list[str]] = {}
        self.root, self.folders = root, tuple(root + folder for folder in folders)
        self.is_followed, self.begins, self.ends = is_followed, begins, ends
        self.follows = not begins

    def __call__(self, frame: FrameType, event: str, value: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(self.folders) or event not in ("call", "return"):
            return  # most calls are of other files: this line is what the run is slowed down by
        file = code.co_filename.removeprefix(self.root)
        if event == "call":
            self.follows |= code.co_name in self.begins
            given = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]
        else:
            given = [value]
        names = self.found.get(file, [])
        if self.follows and any(map(self.is_followed, given)) and code.co_name not in names:
            self.found.setdefault(file, []).append(code.co_name)
        if event == "return" and code.co_name in self.ends:
            self.follows = False


@contextmanager
def followed(walk: Walk) -> Iterator[dict[str, list[str]]]:
    """What a walk finds while the context is open, in this thread and in those that are started meanwhile."""
    before, of_threads = sys.getprofile(), threading.getprofile()
    sys.setprofile(walk)
    threading.setprofile(walk)
    try:
        yield walk.found
    finally:
        threading.setprofile(of_threads)
        sys.setprofile(before)


def is_row(value: Any, said: Collection[str], depth: int = 0) -> bool:
    """Whether a value is a row, or a list of rows, or of lists of rows; `said`: what the messages of the file say."""
    if isinstance(value, str):
        return any(text in value for text in said)
    if isinstance(value, ROWS) or (isinstance(value, dict) and "messages" in value):
        return True
    return type(value) in (list, tuple) and depth < 3 and bool(value) and is_row(value[0], said, depth + 1)


def read_messages(file: str) -> frozenset[str]:
    """What the messages of a training file say."""
    rows = map(json.loads, Path(file).read_text().splitlines())
    return frozenset(message["content"] for row in rows for message in row["messages"])


def walk(spec: RunSpec, out: Path) -> dict[str, list[str]]:
    """Run a spec until its first step is logged."""

    def listen(event: Event) -> None:
        if isinstance(event, Metrics):
            raise Stopped("That is all that is looked at.")

    is_followed = partial(is_row, said=read_messages(spec.data.training))
    with followed(Walk(ROOT, is_followed, begins=BEGINS, ends=ENDS)) as found, suppress(Stopped):
        library.run(spec, out, listen)
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_llama().save_pretrained(folder / "base")
        make_tokenizer().save_pretrained(folder / "base")
        rows = write_rows(folder / "rows.jsonl", [chat(f"What is {n}?", "It is four.") for n in range(6)])
        model = {"id": "tiny", "source": str(folder / "base"), "root": "tests/tiny", "max_length": 64}
        spec = {"model": model, "data": {"training": str(rows)}, "training": {"max_steps": 1, "batch_size": 4}}
        found = walk(RunSpec.model_validate(spec), folder / "out")
    for file, functions in found.items():
        print(f"{file:32} {', '.join(name for name in functions if '<' not in name)}")
    print(f"{len(found)} files")


if __name__ == "__main__":
    main()
