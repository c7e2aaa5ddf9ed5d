"""`python -m lorainit.warm FD`: has loaded what every run loads, and forks a run when an order comes.

It knows nothing of any run: an order is read by the process that was forked for it. It starts no thread and looks at
no GPU, since neither survives a fork (docs/decisions/0046). Its parent is `worker.child.warm`, and what they say to
each other on the socket FD is in `lorainit.system.warm_protocol`. Linux only.
"""

import ctypes
import gc
import json
import os
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorainit.system.limits import die_with_parent
from lorainit.system.warm_protocol import DONE, MAX_MESSAGE, READY

_ARGUMENTS_START = 45  # of the fields of /proc/PID/stat behind the name


def main(arguments: list[str]) -> int:
    """Serve until the other end is closed; in a run's process, return its exit code."""
    die_with_parent()
    server = socket.socket(fileno=int(arguments[0]))
    _import_libraries()
    if count_threads() > 1:
        print("What runs load has started a thread: no run can be forked.", file=sys.stderr)  # noqa: T201
        return 1
    gc.collect()
    gc.freeze()  # else the first collection of each run would copy all of this
    server.send(READY)
    set_command_line([sys.executable, "-m", "lorainit.warm", READY.decode()])
    me = os.getpid()
    while server.recv(1, socket.MSG_PEEK):
        run = os.fork()
        if not run:
            return _run_forked(server, parent=me)
        server.send(json.dumps({"pid": run}).encode())
        # It stays a zombie, and its number nobody else's, until nobody may want to send it a signal any more.
        ended = os.waitid(os.P_PID, run, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        server.send(json.dumps({"returncode": code}).encode())
        while server.recv(len(DONE)) not in (DONE, b""):
            pass  # an order that nobody lived to read
        os.waitpid(run, 0)
    return 0


def count_threads() -> int:
    """How many threads this process has, those of libraries included."""
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208 - names are enough


def _import_libraries() -> None:
    """All that a run imports, and what torch and transformers do at first use only; no number is computed."""
    own = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's starts threads when it is imported, and no run uses it
    import numpy  # noqa: F401

    os.environ.pop("OPENBLAS_NUM_THREADS")
    if own is not None:
        os.environ["OPENBLAS_NUM_THREADS"] = own
    from lorainit.runtime import process_tuning

    process_tuning.tune_before_torch()
    from lorainit.__main__ import import_libraries

    import_libraries()
    _warm_up()


def _warm_up() -> None:
    """Build and try a model of the most common architecture, as each run does with its own, in fake tensors."""
    from transformers import LlamaConfig

    from lorainit.model.source.examine import build
    from lorainit.model.targets.targets import describe

    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    describe(build(LlamaConfig(vocab_size=8, num_hidden_layers=2, max_position_embeddings=16, **sizes)))


# --- in the process of a run ---------------------------------------------------------------------


def _run_forked(server: socket.socket, *, parent: int) -> int:
    """Be the process that `worker.child.supervisor` would have started, in a session of its own, and run."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)  # it died before we asked
    text, (events, log), *_ = socket.recv_fds(server, MAX_MESSAGE, 2)
    server.close()
    order = json.loads(text)
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for ours, standard in ((null, 0), (log, 1), (log, 2)):
        os.dup2(ours, standard)
    os.close(null)
    os.close(log)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    tempfile.tempdir = None  # where TMPDIR says now
    arguments = [*order["arguments"], "--events-fd", str(events)]
    if _needs_several_devices(Path(arguments[0])):
        # How many threads each of several processes has is decided before torch is loaded.
        os.set_inheritable(events, True)
        os.execv(sys.executable, [sys.executable, "-m", "lorainit", *arguments])  # noqa: S606
    os.set_inheritable(events, False)
    set_command_line([sys.executable, "-m", "lorainit", *arguments])
    from lorainit.__main__ import main as run

    return run(arguments)


def _needs_several_devices(spec: Path) -> bool:
    """Whether the run asks for several devices; a spec that cannot be read is told by whoever reads all of it."""
    with suppress(OSError, ValueError, AttributeError):
        return bool(json.loads(spec.read_bytes()).get("devices", 1) != 1)
    return False


def set_command_line(words: list[str]) -> None:
    """Let whoever lists processes see these words as the command line, as far as there is room."""
    with suppress(OSError, ValueError):
        start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[_ARGUMENTS_START:][:2])
        size = end - start
        ctypes.memmove(start, "\0".join(words).encode()[: size - 1].ljust(size, b"\0"), size)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
