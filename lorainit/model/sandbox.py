"""Inspects a base model in a child process with limited time and memory, so that no file can harm the service.

The libraries that read model files trust them, so a bad file can cause more than an exception: a crash, an endless
loop, or use of all memory. The child limits itself before it reads anything, the parent kills it when its time is over,
and in each case the caller gets an error with a sentence. The parent does not load torch.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lorainit.config.errors import HostFailed, LorainitError, UnsupportedModel
from lorainit.model.source.find import find
from lorainit.system import limits
from lorainit.system.host_failure import is_host_failure

# The time for a base of any size, apart from reading its weights: building the modules takes seconds, and loading our
# libraries about ten seconds on a slow disk.
MAX_SECONDS = 180.0
# The additional time for reading and hashing weights, or for converting them from GGUF, on a very slow disk.
BYTES_PER_SECOND = 20e6
# A narrow copy of the model takes 1.2 GB at the most, our libraries 1 GB, a tokenizer some 0.5 GB.
MAX_BYTES = 8 << 30
# A GGUF file is unpacked in memory, so it needs this multiple of its size: about 2 bits per weight become 32, and these
# are copied once.
UNPACKED = 32
_TAIL = 2000  # so many last bytes of the child's output are kept, to explain a crash


def inspect(source: str, cache: Path) -> dict[str, Any]:
    """The facts of a base model (`lorainit.config.model_facts.ModelFacts`) as JSON values.

    A base on a hub is downloaded first, by this process, because a download may take longer than the child is allowed.

    Raises:
        UnsupportedModel: the base cannot be used; the message gives the reason.
        HostFailed: this host cannot read it now, which is not the base's fault.
    """
    try:
        found = find(source)
    except OSError as error:
        if is_host_failure(error):
            raise HostFailed(_host_failure_text(error)) from error
        raise
    command = [sys.executable, "-m", "lorainit", "inspect", str(found.path), "--cache", str(cache), "--confined"]
    facts = {**_run_child(command), "source": found.source}
    return facts | ({"root": found.hub_id} if found.hub_id else {})


def _run_child(command: list[str]) -> dict[str, Any]:
    """Run the child and return the facts that it reports."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    said: list[str] = []
    listener = threading.Thread(target=_keep_tail, args=(child.stderr, said), daemon=True)
    with child:
        try:
            listener.start()
            answer = _read_answer(child)
        finally:
            child.kill()
        listener.join(1.0)
    if "facts" in answer:
        return dict(answer["facts"])
    if "failed" in answer:
        raise HostFailed(answer["failed"])
    raise UnsupportedModel(answer.get("message") or _explain_death(child.returncode, said), param="model")


def _read_answer(child: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """The child's answer; {} if it ended without one."""
    assert child.stdout is not None
    out_of_time: list[float] = []

    def stop(seconds: float) -> None:
        out_of_time.append(seconds)
        child.kill()

    with _timer(stop) as restart:
        for line in child.stdout:
            word = json.loads(line)
            if "bytes" not in word:
                return dict(word)
            restart(word["bytes"])  # the child now knows how much it has to read, so its time depends on that
    if out_of_time:
        return {"message": f"The base model cannot be inspected: reading it took more than {out_of_time[0]:.0f} s."}
    return {}


@contextmanager
def _timer(stop: Callable[[float], None]) -> Iterator[Callable[[int], None]]:
    """Call `stop` when the time is over. Yields a function that restarts the time, for reading so many bytes."""
    timers: list[threading.Timer] = []

    def start(size: int) -> None:
        cancel()
        seconds = MAX_SECONDS + size / BYTES_PER_SECOND
        timers.append(threading.Timer(seconds, stop, [seconds]))
        timers[-1].daemon = True
        timers[-1].start()

    def cancel() -> None:
        while timers:
            timers.pop().cancel()

    start(0)
    try:
        yield start
    finally:
        cancel()


def _keep_tail(stream: IO[bytes], said: list[str]) -> None:
    """Read to the end and keep the last bytes. The stream must be read, because a full pipe would block the child."""
    tail = b""
    with suppress(ValueError):  # the stream was closed while it was read
        while chunk := stream.read1(1 << 16):  # type: ignore[attr-defined]
            tail = (tail + chunk)[-_TAIL:]
            said[:] = [tail.decode("utf-8", "replace")]


def _explain_death(code: int, said: list[str]) -> str:
    """A sentence about a child that ended without an answer."""
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    words = said[0].strip().splitlines()[-1:] if said else []
    return f"The base model cannot be inspected: reading it ended with {how}{''.join(f' ({w[:300]})' for w in words)}."


# --- in the child --------------------------------------------------------------------------------


def inspect_for_parent(source: str, cache: Path) -> None:
    """Inspect a base and write lines for the parent: how much there is to read, then the facts or the error."""
    sys.stdout = sys.stderr  # because lines that a library prints must not be taken for an answer
    limits.bound_memory(MAX_BYTES)
    limits.die_with_parent()
    from lorainit.model.inspect import inspect
    from lorainit.runtime.devices import is_out_of_memory
    from lorainit.runtime.refusal import as_unsupported

    try:
        with as_unsupported("The base model cannot be inspected"):
            path = Path(source)
            files = list(path.glob("*.safetensors")) if path.is_dir() else [path]
            limits.bound_memory(MAX_BYTES + max(map(_allocated, files), default=0) * (1 if path.is_dir() else UNPACKED))
            _write_line({"bytes": sum(map(_allocated, files))})
            facts = inspect(source, cache=cache)
    except LorainitError as error:
        _write_line({"message": error.message})
    except Exception as error:
        if is_host_failure(error):
            _write_line({"failed": _host_failure_text(error)})
            return
        if not is_out_of_memory(error):
            raise
        _write_line(
            {"message": f"The base model cannot be inspected: reading it takes more than {MAX_BYTES >> 30} GiB."}
        )
    else:
        _write_line({"facts": facts.model_dump(mode="json")})


def _host_failure_text(error: Exception) -> str:
    return f"This host failed while the base model was inspected: {' '.join(str(error).split())[:300]}"


def _write_line(word: dict[str, Any]) -> None:
    os.write(1, json.dumps(word).encode() + b"\n")


def _allocated(path: Path) -> int:
    """The bytes of a file that must be read; holes of a sparse file take no space on the disk and do not count."""
    try:
        facts = path.stat()
    except OSError:
        return 0
    return min(facts.st_size, facts.st_blocks * 512)
