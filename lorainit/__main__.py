"""`python -m lorainit spec.json out/`: fine-tunes without the service. A worker starts it as its child process too.

Exit codes: 0 done, 1 failed, 2 the spec is wrong, 75 the lease ran out, 141 nobody reads what it prints, 143 asked to
stop (the steps taken are in a checkpoint). A run of several processes ends as the first process that failed: with its
exit code, or by the same signal.
"""

import argparse
import importlib.util
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TextIO

from pydantic import ValidationError

from lorainit.config.errors import DeviceSilent, Dropped, HaltReached, LorainitError, Stopped
from lorainit.config.events import Event, Failed, OnEvent
from lorainit.config.sources import LOCAL, is_root
from lorainit.config.spec import RunSpec
from lorainit.config.validation_errors import describe_errors
from lorainit.leases import LEASE_LOST, StopRequest, watch_leases
from lorainit.runtime import process_tuning
from lorainit.runtime.distributed.launch import (
    EXIT_SECONDS,
    RENDEZVOUS,
    PeerFailure,
    PeerProcesses,
    count_processes,
    end_process,
    start_peers,
    write_peer_failure,
)
from lorainit.system import closed_pipe, watchdog
from lorainit.system.host_failure import is_host_failure
from lorainit.system.limits import die_with_parent

FAILED, WRONG_SPEC, STOPPED = 1, 2, 143


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["inspect"]:
        return _inspect(arguments[1:])
    if arguments[:1] == ["doctor"]:
        return _doctor(arguments[1:])
    args = _parser().parse_args(arguments)
    members = [
        _RunArguments(args.spec, args.out, args.lease),
        *(_RunArguments(*map(Path, three)) for three in args.member),
    ]
    if args.events_fd is not None or _rank():
        die_with_parent(LEASE_LOST)
    leases = [member.lease for member in members if member.lease]
    if leases:
        watch_leases(leases)
    stop = StopRequest(leases)
    signal.signal(signal.SIGTERM, stop.ask)
    specs = [_read_spec(member.spec) for member in members]
    if any(spec is None for spec in specs):
        return WRONG_SPEC
    runs = [(spec, member) for spec, member in zip(specs, members, strict=True) if spec is not None]
    if args.events_fd is not None:
        with os.fdopen(args.events_fd, "w", buffering=1) as stream:
            return _run_with_peers(runs, stop, lambda event: _write_event(stream, event))
    if _rank():
        # Only rank 0 emits events, since the worker reads one stream. The other ranks write down why they failed.
        return _run_with_peers(runs, stop, partial(write_peer_failure, args.out))
    from lorainit.progress import ProgressDisplay

    with ProgressDisplay() as display:
        code = _run_with_peers(runs, stop, partial(_show_and_print, display.show))
    display.conclude()
    return code


class _RunArguments(NamedTuple):
    """One run of the command line: usually the only one."""

    spec: Path
    out: Path
    lease: Path | None


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _start_peers(runs: list[tuple[RunSpec, _RunArguments]]) -> AbstractContextManager[PeerProcesses]:
    """Start the peers of a run on several devices. A process that is itself a peer (RANK is set) starts none."""
    spec, member = runs[0]
    if spec.devices == 1 or "RANK" in os.environ:
        return nullcontext(PeerProcesses())
    lease = ["--lease", str(member.lease)] if member.lease else []
    return start_peers(spec.devices, [str(member.spec), str(member.out), *lease], out=member.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lorainit",
        description="Fine-tune a LoRA adapter as a spec file says, or several on one base in one forward pass.",
        epilog="python -m lorainit inspect SOURCE prints the facts of a base model as JSON,"
        " python -m lorainit doctor what runs find on this machine.",
    )
    parser.add_argument("spec", type=Path, help="the run's spec, a JSON file")
    parser.add_argument("out", type=Path, help="folder for the adapter, checkpoints and metrics")
    parser.add_argument("--events-fd", type=int, help="write events as JSON lines to this file descriptor")
    parser.add_argument("--lease", type=Path, help="file with a CLOCK_MONOTONIC deadline; exit 75 when it is past")
    parser.add_argument(
        "--member",
        nargs=3,
        action="append",
        default=[],
        metavar=("SPEC", "OUT", "LEASE"),
        help="another run to train together with the first; past its lease it is dropped, and the others go on",
    )
    return parser


def _run_with_peers(runs: list[tuple[RunSpec, _RunArguments]], stop: StopRequest, on_event: OnEvent) -> int:
    with ExitStack() as exits:
        try:
            peers = exits.enter_context(_start_peers(runs))
        except Exception as error:
            return _emit_failure(error, range(len(runs)), on_event, PeerProcesses())
        return _run(runs, stop, on_event, peers)


def _run(runs: list[tuple[RunSpec, _RunArguments]], stop: StopRequest, on_event: OnEvent, peers: PeerProcesses) -> int:
    """Run, and return the exit code. After a failure the peers are killed, because they would wait for this process."""
    code = _run_to_an_end(runs, stop, on_event, peers)
    if code:
        peers.kill()
    return code


def _run_to_an_end(
    runs: list[tuple[RunSpec, _RunArguments]], stop: StopRequest, on_event: OnEvent, peers: PeerProcesses
) -> int:
    """Run all specs, emit a `Failed` event for each one that failed, and return the exit code."""
    open_runs, failed = set(range(len(runs))), False
    peers.watch(partial(_exit_like_peer, on_event=on_event, peers=peers))
    try:
        # Before anything else loads torch, because it reads some settings only once. This call loads it, too.
        message = process_tuning.tune_process()
        process_tuning.keep_compiled_kernels(runs[0][0].cache)
        for who in range(len(runs)):
            on_event(message.model_copy(update={"member": who}))
        import_libraries()
        from lorainit.context import RunRequest
        from lorainit.run import run_together

        watched = _with_watchdog(runs[0][0], on_event, peers)
        requests = [
            RunRequest(spec, member.out, stop.make_listener(who, member.lease, watched))
            for who, (spec, member) in enumerate(runs)
        ]
        for who, end in run_together(requests):
            open_runs.discard(who)
            if isinstance(end, LorainitError) and not isinstance(end, Dropped | HaltReached):
                on_event(_to_failed_event(who, end))
                failed = True
    except (Stopped, KeyboardInterrupt):
        return STOPPED
    except BrokenPipeError:
        return STOPPED  # the reader of the events is gone, so there is nobody to report a failure to
    except Exception as error:
        if len(runs) > 1 and _has_ended_cuda(error):
            traceback.print_exc()
            # No event names a run, because any of them may have caused it. The worker then tries each run alone.
            return FAILED
        return _emit_failure(error, sorted(open_runs), on_event, peers)
    return FAILED if failed else 0


def _emit_failure(error: Exception, members: Iterable[int], on_event: OnEvent, peers: PeerProcesses) -> int:
    """Emit a `Failed` event for each of these runs, also if they had not begun yet."""
    ours = _translate_error(error)
    if ours is None:
        traceback.print_exception(error)
    is_lost = isinstance(ours, DeviceSilent)
    if (is_lost or ours is None) and (failure := peers.find_failure()):
        _exit_like_peer(failure, on_event, peers)
    for who in members:
        on_event(_to_failed_event(who, ours or LorainitError("The run failed for a reason that is ours, not yours.")))
    if is_lost:
        peers.kill()
        _kill_rank0()
    return FAILED


def _translate_error(error: Exception) -> LorainitError | None:
    """The `LorainitError` for any exception, or None if it is a bug.

    It is also called for errors before `run_together` has begun, for example when the disk of the kernel cache is full.
    """
    if isinstance(error, LorainitError):
        return error
    try:
        from lorainit.runtime.distributed import run_errors
    except Exception:
        return None  # the import failed, perhaps for the same reason as the run, so nothing can translate the error
    return run_errors.translate_error(error)


def _to_failed_event(who: int, error: LorainitError) -> Failed:
    return Failed(member=who, code=error.code, message=error.message, param=error.param, may_pass=error.may_pass)


def import_libraries() -> None:
    """Import all that a run needs. Call it after `process_tuning`, since some settings only work before torch loads."""
    # PEFT imports bitsandbytes if it is installed. On a CPU that logs a warning about kernels which no run needs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    import lorainit.run  # noqa: F401

    disable_progress_bar()


def _exit_like_peer(failure: PeerFailure, on_event: OnEvent, peers: PeerProcesses) -> None:
    """Exit at once with the exit code or signal of a peer that failed, so that the worker sees the true reason."""
    peers.kill()
    if failure.code in (LEASE_LOST, STOPPED):
        os._exit(failure.code)
    if failure.code in (-signal.SIGTERM, -signal.SIGINT):
        os._exit(STOPPED)  # not by the signal itself, because our own handlers would catch it and go on
    if failure.code < 0:
        os.kill(os.getpid(), -failure.code)
    if failure.event is not None:
        on_event(failure.event)
    os._exit(FAILED)


def _with_watchdog(spec: RunSpec, on_event: OnEvent, peers: PeerProcesses) -> OnEvent:
    """`on_event` with a watchdog, for a run of several processes: it ends the run if no event comes for too long."""
    if spec.devices == 1:
        return on_event

    def give_up() -> None:
        if not _rank() and peers.have_ended:
            return  # this process works alone now, so there is no peer that could make it hang
        on_event(watchdog.timeout_failure(timer.time_limit))
        peers.kill()
        _kill_rank0()
        os._exit(FAILED)

    timer = watchdog.Watchdog()
    watchdog.start(timer, give_up)

    def listen(event: Event) -> None:
        timer.reset(event)
        on_event(event)

    return listen


def _has_ended_cuda(error: Exception) -> bool:
    from lorainit.runtime import machine_errors

    return machine_errors.is_kernel_assert(error)


def _kill_rank0() -> None:
    """Kill rank 0, our parent, if this is a peer that it started: rank 0 may be what hangs, and nobody else sees that.

    It first gets `EXIT_SECONDS` to end by itself, because it can report the failure better than a kill does.
    """
    if _rank() and RENDEZVOUS in os.environ:
        time.sleep(EXIT_SECONDS)
        os.kill(os.getppid(), signal.SIGKILL)


def _show_and_print(show: OnEvent, event: Event) -> None:
    """Show an event, and print a failure on stderr.

    Only the command line does this. A worker would store stderr in its log, and the message may quote training rows.
    """
    show(event)
    if isinstance(event, Failed):
        print(f"{event.code}: {event.message}", file=sys.stderr, flush=True)  # noqa: T201 - this is the command line


def _write_event(stream: TextIO, event: Event) -> None:
    stream.write(event.model_dump_json() + "\n")


def _read_spec(path: Path) -> RunSpec | None:
    try:
        text = path.read_bytes()
    except OSError as error:
        if is_host_failure(error):
            raise  # not the spec's fault, so this must not end as `WRONG_SPEC`: the worker tries the run again
        print(f"{path}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return None
    try:
        return RunSpec.model_validate_json(text)
    except ValidationError as error:
        broken = error.errors()[0]["type"] == "json_invalid"
        for place, sentence in describe_errors(error, None if broken else json.loads(text)).items():
            print(f"{path}: {place or 'spec'}: {sentence}", file=sys.stderr)  # noqa: T201
    return None


def _inspect(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m lorainit inspect", description="Facts of a base model as JSON.")
    parser.add_argument("source", help="folder, .gguf file, package:<package>/<file> or [hub:]<owner>/<name>[@<rev>]")
    parser.add_argument("--root", help="hub id of the base's own, untouched weights, for the adapters to name it by")
    parser.add_argument("--cache", type=Path, help="where GGUF files are converted to (default: a temporary folder)")
    # For our own use: `sandbox.inspect` starts this command again with the option, in a process with limits.
    parser.add_argument("--confined", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if _lacks_torch("A base model cannot be inspected here"):
        return FAILED
    from lorainit.model import sandbox

    if args.confined:
        sandbox.inspect_for_parent(args.source, args.cache)
        return 0
    if args.root is not None and not is_root(args.root):
        parser.error(f"--root must be OWNER/NAME, or {LOCAL}NAME of a base that is on no hub (got {args.root!r})")
    try:
        with TemporaryDirectory() as temporary:
            facts = sandbox.inspect(args.source, cache=args.cache or Path(temporary))
    except LorainitError as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)  # noqa: T201
        return FAILED
    facts |= {"root": args.root} if args.root else {}
    print(json.dumps(facts, indent=2))  # noqa: T201
    return 0


def _doctor(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m lorainit doctor", description="What runs find on this machine.")
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(arguments)
    if _lacks_torch("Nothing can be trained here"):
        return FAILED
    from lorainit.runtime import doctor
    from lorainit.system import doctor_text, driver

    try:
        found = doctor.examine()
    except driver.DriverSilent as error:
        print(error, file=sys.stderr)  # noqa: T201
        return FAILED
    print(doctor.as_json(found) if args.json else doctor_text.as_text(found))  # noqa: T201
    # A program that asks for JSON finds the trouble there, so for it exit code 1 means that the command itself failed.
    return FAILED if found["machine"]["gpu_trouble"] and not args.json else 0


def _lacks_torch(consequence: str) -> bool:
    """Whether torch is not installed; if so, print what follows from that."""
    if importlib.util.find_spec("torch") is not None:
        return False
    print(f"{consequence}: torch is not installed.", file=sys.stderr)  # noqa: T201
    return True


if __name__ == "__main__":
    code = closed_pipe.run(main)
    if isinstance(code, int) and count_processes() > 1:
        end_process(code)
    sys.exit(code)
