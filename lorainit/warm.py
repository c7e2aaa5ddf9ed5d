"""`python -m lorainit.warm FD`: a process that has imported torch and transformers, and forks each run when asked.

A forked run begins in a second instead of six, because the imports are done. The forked process reads the order
itself, so that nothing of one run is in the memory of the next. This process starts no thread and uses no GPU, since
neither survives a fork (docs/decisions/0046). Its parent is `worker.child.warm`; the messages on the socket FD are in
`lorainit.system.warm_protocol`. Linux only.
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

# Index of `arg_start` (field 48 in proc(5)) among the fields of /proc/PID/stat behind the name. We split behind the
# name, because a name may contain spaces and brackets.
_ARGUMENTS_START = 45


def main(arguments: list[str]) -> int:
    """Serve orders until the parent closes the socket. In a forked process: run, and return the run's exit code."""
    die_with_parent()
    server = socket.socket(fileno=int(arguments[0]))
    preload()
    if count_threads() > 1:
        print("An imported library has started a thread, so no run can be forked.", file=sys.stderr)  # noqa: T201
        return 1
    server.send(READY)
    set_command_line([sys.executable, "-m", "lorainit.warm", READY.decode()])
    me = os.getpid()
    # MSG_PEEK leaves the order in the socket, because the forked process has to read it.
    while server.recv(1, socket.MSG_PEEK):
        run = os.fork()
        if not run:
            return _run_forked(server, parent=me)
        server.send(json.dumps({"pid": run}).encode())
        # WNOWAIT leaves the ended run a zombie, so that its process id is not reused while the parent may still send
        # it a signal. The parent says DONE when it will send no more.
        ended = os.waitid(os.P_PID, run, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        server.send(json.dumps({"returncode": code}).encode())
        while server.recv(len(DONE)) not in (DONE, b""):
            pass  # an order that the forked process did not live to read
        os.waitpid(run, 0)
    return 0


def count_threads() -> int:
    """How many threads this process has, those of libraries included."""
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208 - names are enough


def preload() -> None:
    """Import what a run needs, and keep it from garbage collection, before runs are forked from this process."""
    _import_libraries()
    gc.collect()
    # Otherwise the first garbage collection of each run would write to these objects and so copy their memory pages.
    gc.freeze()


def _import_libraries() -> None:
    """Import all that a run imports, and do the work that torch and transformers do only at their first use."""
    own = os.environ.get("OPENBLAS_NUM_THREADS")
    # numpy's OpenBLAS would start threads at import, and a process with threads cannot be forked safely. No run uses
    # numpy's OpenBLAS, so one thread costs nothing.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
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
    """Build a tiny Llama in fake tensors, since a run's first model takes longer than later ones."""
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
    """Set this process up as `worker.child.supervisor` would have started it, in its own session, and run."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)  # the parent died before `die_with_parent`, so the kernel will send no signal
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
    tempfile.tempdir = None  # forget the cached folder, so that the TMPDIR of this run is used
    arguments = [*order["arguments"], "--events-fd", str(events)]
    if _needs_several_devices(Path(arguments[0])):
        # These need a new interpreter: threads are shared out between the processes before torch is loaded.
        os.set_inheritable(events, True)
        os.execv(sys.executable, [sys.executable, "-m", "lorainit", *arguments])  # noqa: S606
    os.set_inheritable(events, False)
    set_command_line([sys.executable, "-m", "lorainit", *arguments])
    from lorainit.__main__ import main as run

    return run(arguments)


def _needs_several_devices(spec: Path) -> bool:
    """Whether the run asks for several devices. False for a spec that cannot be read: `main` reports that later."""
    with suppress(OSError, ValueError, AttributeError):
        return bool(json.loads(spec.read_bytes()).get("devices", 1) != 1)
    return False


def set_command_line(words: list[str]) -> None:
    """Write these words over the command line that `ps` shows, cut to the length of the present one.

    Otherwise an operator could not tell which run a forked process belongs to.
    """
    with suppress(OSError, ValueError):
        start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[_ARGUMENTS_START:][:2])
        size = end - start
        ctypes.memmove(start, "\0".join(words).encode()[: size - 1].ljust(size, b"\0"), size)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
