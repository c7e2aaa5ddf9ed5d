"""`python -m lorainit` and other modules in processes that are forked from one which has imported all they need.

A process from scratch imports for four seconds of a processor, where a tiny run takes one. Some tests start processes
from scratch all the same, as a person does (test_main.py), as a run of several processes does
(runtime/distributed/test_world.py) and as a worker does (tests/worker/child/test_warm.py).
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.reduction import DupFd
from typing import IO, Any, NoReturn

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.lorainit.preloaded"])


class Forked:
    """`python -m MODULE ARGUMENTS` or `python -W error -c CODE ARGUMENTS`, to be used as `subprocess.Popen` is.

    What it prints is there when it has ended: call `communicate`, which closes the files that hold it. Variables that
    libraries read when they are imported have no effect, nor has `sitecustomize`, because all is imported already.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        module: str = "lorainit",
        code: str = "",
        events: int | None = None,
        errors: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """`events`: for `--events-fd`; `errors`: for what it prints as such. Both stay the caller's, to be closed."""
        self._said: tuple[str, str] | None = None
        self._outputs = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 - `communicate` closes them
        files = [_Handed(self._outputs[0].fileno()), _Handed(errors or self._outputs[1].fileno())]
        named = None if events is None else _Handed(events)
        order = (
            "" if code else module,
            code,
            [str(argument) for argument in arguments],
            files,
            named,
            dict(os.environ if env is None else env),
        )
        self._process = _CONTEXT.Process(target=_become, args=order)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """-n for signal n; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Its output and its errors, once it has ended."""
        self.wait(timeout)
        if self._said is None:
            output, errors = (_read(file) for file in self._outputs)
            self._said = output, errors
        return self._said

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Handed:
    """A descriptor that the other process gets with its order."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _received, (DupFd(self.number),)  # only while a process is started


def _received(handed: Any) -> int:
    number: int = handed.detach()
    return number


def _read(file: IO[bytes]) -> str:
    with file:
        file.seek(0)
        return file.read().decode()


# --- in the process that was forked ---------------------------------------------------------------


def _become(
    module: str, code: str, arguments: list[str], files: list[int], events: int | None, environment: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    for standard, file in enumerate(files, start=1):
        os.dup2(file, standard)
        os.close(file)
    if events is not None:
        arguments = [*arguments, "--events-fd", str(events)]
    subprocess.Popen._execute_child = _fork_or_execute(subprocess.Popen._execute_child)  # type: ignore[attr-defined]
    if module:
        _run(module, arguments)
    else:
        sys.argv = ["-c", *arguments]
        warnings.simplefilter("error")
        exec(code, {"__name__": "__main__"})


def _run(module: str, arguments: list[str]) -> None:
    """What `python -m MODULE` does."""
    sys.argv = [module, *arguments]
    sys.modules.pop(f"{module}.__main__", None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _fork_or_execute(execute: Callable[..., None]) -> Callable[..., None]:
    """Another process of the same run is forked from this one, which has loaded torch and not begun to use it."""

    def start(popen: Any, args: Sequence[str], executable: Any, preexec_fn: Any, close_fds: bool, pass_fds: Any,
              cwd: Any, env: Any, *more: Any) -> None:  # fmt: skip
        if list(args[:3]) != [sys.executable, "-m", "lorainit"]:
            execute(popen, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more)
            return
        popen.pid = os.fork()
        if not popen.pid:
            _be_another(list(args[3:]), preexec_fn, env)
        popen._child_created = True

    return start


def _be_another(arguments: list[str], preexec_fn: Callable[[], None] | None, env: Mapping[str, str]) -> NoReturn:
    code: Any = 1
    try:
        if preexec_fn is not None:
            preexec_fn()
        os.closerange(3, 1024)
        os.environ.clear()
        os.environ.update(env)
        _run("lorainit", arguments)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
