"""`make audit`: known holes in what is installed. Says loudly when it could not look, and never that all is well then.

Exit code 0: nothing known. 1: something is. 2: nobody knows; with `--or-skip`, 0 and a notice.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOME = Path(__file__).parents[2] / ".venvs" / "audit"
PROGRAM = (str(HOME / "bin" / "pip-audit"),)
PATIENCE = 300


class CannotLook(Exception):
    """No answer from the advisory service, or no program to ask it."""


def install() -> None:
    """An environment of its own: what looks at our packages is not one of them."""
    if not (HOME / "bin" / "pip-audit").exists():
        venv.create(HOME, with_pip=True)
        command = [str(HOME / "bin" / "python"), "-m", "pip", "install", "--quiet", "pip-audit>=2.9"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotLook(last_line(done.stderr))


def holes(program: Sequence[str]) -> list[str]:
    """One line for each known hole in the packages of this Python."""
    where = ["--path", sysconfig.get_path("purelib"), "--skip-editable"]
    command = [*program, *where, "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotLook(str(error)) from error
    try:
        report = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError) as error:
        raise CannotLook(last_line(done.stderr)) from error
    if not any("vulns" in package for package in report):
        raise CannotLook("it looked at no package at all")
    return [described(package, hole) for package in report for hole in package.get("vulns", [])]


def described(package: dict[str, Any], hole: dict[str, Any]) -> str:
    """Which package, which hole, and the version that mends it."""
    mended = ", ".join(hole["fix_versions"]) or "nothing yet"
    return f"{package['name']} {package['version']}: {hole['id']}, fixed in {mended}"


def last_line(text: str) -> str:
    """The end of an error, which says what it was."""
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def main(arguments: Sequence[str], program: Sequence[str] = PROGRAM) -> int:
    """Look, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--or-skip", action="store_true", help="no failure when the advisory service is away")
    chosen = parser.parse_args(arguments)
    try:
        if program == PROGRAM:
            install()
        found = holes(program)
    except CannotLook as reason:
        print(f"*** AUDIT SKIPPED: known holes were NOT looked up: {reason}", file=sys.stderr)
        return 0 if chosen.or_skip else 2
    print("\n".join(found) or "no known holes in what is installed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
