"""What trains in the chaos run: the protocol of `python -m lorainit`, with a chain of hashes for weights.

    python trainer.py SPEC OUT --events-fd N --lease FILE [--member SPEC OUT LEASE ...]

The state after step n is SHA-256 of the state after step n - 1, so a step that was left out, done twice
or done on a wrong checkpoint shows in the adapter; the loss of a step is made of its state, so it shows
in the metrics. Each step writes a line into CHAOS_LOG when it begins: nobody but this program knows
when it really ran. A job that has a file in CHAOS_HELD does not take its last step before that is gone.
Only the standard library, so that it starts in a moment.
"""

import ctypes
import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

LEASE_LOST, STOPPED = 75, 143
STEP_SECONDS = float(os.environ.get("CHAOS_STEP_SECONDS", "0.05"))
GUARD_SECONDS = 0.5  # as often as the real one


def begin(seed: int) -> str:
    """The state before the first step."""
    return hashlib.sha256(str(seed).encode()).hexdigest()


def after(state: str, step: int) -> str:
    """The state after `step`."""
    return hashlib.sha256(f"{state}/{step}".encode()).hexdigest()


def loss(state: str) -> float:
    """A number in [0, 1) that only this state has."""
    return int(state[:12], 16) / 16**12


class Trainer:
    """One run, from its arguments to its last word; `member`: its number among those of this process."""

    def __init__(self, member: int, spec_file: str, out: str, lease: str, *, fd: int) -> None:
        self.member, self.out, self.lease, self.fd = member, Path(out), Path(lease), fd
        spec = json.loads(Path(spec_file).read_text())
        self.steps, self.interval = spec["training"]["max_steps"], spec["training"]["checkpoint_interval"]
        self.seed, self.rank, self.resume_from = spec["seed"], spec["lora"]["r"], spec["resume_from"]
        attempt, job = self.out.parent.name, self.out.parent.parent.name
        self.log, self.held = Path(os.environ["CHAOS_LOG"]) / job, Path(os.environ["CHAOS_HELD"]) / job
        self.token = attempt.removeprefix("attempt-")

    def begin(self) -> None:
        """Start, or go on from a checkpoint."""
        self.write(0, time.monotonic())
        self.step, self.state = self.resumed()
        self.say(kind="stage", stage="loading", message="Loading")
        self.say(**self.plan())
        self.say(kind="stage", stage="training", message="Training")

    def train(self, *, last: bool) -> bool:
        """One step, with a checkpoint after it where one is due or it is the `last`; False when all are taken."""
        if self.step == self.steps:
            self.finish(self.state)
            return False
        # The time first: a freeze between the two lines must not count as a step without a lease.
        began = time.monotonic()
        if self.past():
            return False
        if self.step == self.steps - 1 and self.held.exists() and not last:
            return True
        self.step += 1
        self.write(self.step, began)
        self.state = after(self.state, self.step)
        self.say(**self.metrics(self.step, self.state))
        if self.step % self.interval == 0 or last:
            self.checkpoint(self.step, self.state)
        return True

    def resumed(self) -> tuple[int, str]:
        if self.resume_from is None:
            return 0, begin(self.seed)
        found = json.loads((Path(self.resume_from) / "state.json").read_text())
        return found["step"], found["state"]

    def checkpoint(self, step: int, state: str) -> None:
        folder = self.out / f"step-{step}"
        self.adapter(folder / "adapter", state)
        (folder / "state.json").write_text(json.dumps({"step": step, "state": state}))
        self.say(kind="checkpoint", step=step, path=str(folder), metrics={"step": step})

    def finish(self, state: str) -> None:
        self.say(kind="stage", stage="exporting", message="Exporting")
        folder = self.adapter(self.out / "adapter", state)
        check = {"passed": True, "format": "peft", "export_rank": self.rank}
        self.say(kind="done", adapter=str(folder), trained_tokens=self.steps, export_check=check, resources={})

    @staticmethod
    def adapter(folder: Path, state: str) -> Path:
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (folder / "adapter_model.safetensors").write_text(state)
        return folder

    def metrics(self, step: int, state: str) -> dict[str, Any]:
        numbers = {"epoch": 0.1, "tokens": step, "seconds": 0.1, "train_loss": loss(state)}
        return {"kind": "metrics", "step": step, "total_steps": self.steps, **numbers}

    def plan(self) -> dict[str, Any]:
        counts = ("steps_per_epoch", "rows", "trained_tokens_per_epoch", "micro_batch_size", "modules")
        return {
            "kind": "plan",
            "total_steps": self.steps,
            **dict.fromkeys((*counts, "tokens_per_pass", "trainable_parameters"), 1),
            "target_modules": ["q_proj"],
            "device": "cpu",
            "precision": "fp32",
        }

    def say(self, **event: Any) -> None:
        os.write(self.fd, json.dumps({**event, "member": self.member}).encode() + b"\n")

    def write(self, step: int, began: float) -> None:
        """One line: when, which attempt, which process, which step; 0 = the process started."""
        with self.log.open("a") as log:
            log.write(f"{began:.6f} {self.token} {os.getpid()} {step}\n")

    def past(self) -> bool:
        try:
            return time.monotonic() > float(self.lease.read_text())
        except (OSError, ValueError):
            return True


class Run:
    """The members of this process, a step of each in turn."""

    def __init__(self, arguments: list[str]) -> None:
        fd = int(arguments[arguments.index("--events-fd") + 1])
        first = [*arguments[:2], arguments[arguments.index("--lease") + 1]]
        others = [arguments[n + 1 : n + 4] for n, word in enumerate(arguments) if word == "--member"]
        self.members = [Trainer(number, *places, fd=fd) for number, places in enumerate([first, *others])]
        self.asked_to_stop = False

    def train(self) -> None:
        """All of them, until each has ended or lost its lease."""
        for one in self.members:
            one.begin()
        active = list(self.members)
        while active:
            time.sleep(STEP_SECONDS)
            self.check()
            last = self.asked_to_stop
            active = [one for one in active if one.train(last=last)]
            if last:
                sys.exit(STOPPED)
        self.check()  # rather than end without a word

    def ask_to_stop(self, *_: Any) -> None:
        """The signal handler: the step that is going on is finished and kept."""
        self.asked_to_stop = True

    def check(self) -> None:
        """Leave when no lease holds any more."""
        if all(one.past() for one in self.members):
            os._exit(LEASE_LOST)

    def guard(self) -> None:
        """Look now and then, whatever the run is doing."""
        while True:
            self.check()
            time.sleep(GUARD_SECONDS)


def main() -> None:
    """Die with the supervisor, watch the leases, train."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(LEASE_LOST)
    run = Run(sys.argv[1:])
    signal.signal(signal.SIGTERM, run.ask_to_stop)
    threading.Thread(target=run.guard, daemon=True).start()
    run.train()


if __name__ == "__main__":
    main()
