"""An environment without torch, in .venvs/no-torch, with the package installed as an image would have it.

    python tests/deploy/environment.py

The dependencies are installed once per requirements/api.txt, as the image of the API has them. The package itself is
built and installed (not linked) whenever a source file has changed, so a file that is missing from
the wheel is missing here.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACE = ROOT / ".venvs" / "no-torch"
PACKAGES = ("api", "worker", "lorainit", "migrations")


def prepare() -> Path:
    """The environment's Python, made or renewed if need be."""
    PLACE.parent.mkdir(exist_ok=True)
    with (PLACE.parent / "no-torch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        python = PLACE / "bin" / "python"
        wanted = _digest(["requirements/api.txt"])
        if _stamp("dependencies") != wanted:
            print("preparing an environment without torch ...", flush=True)
            venv.create(PLACE, with_pip=True, clear=True)
            _pip(python, "--require-hashes", "--no-deps", "--requirement", "requirements/api.txt")
            (PLACE / "dependencies").write_text(wanted)
        source = _digest(
            ["pyproject.toml", *(str(p.relative_to(ROOT)) for name in PACKAGES for p in (ROOT / name).rglob("*.*"))]
        )
        if _stamp("source") != source:
            _pip(python, "--no-deps", "--force-reinstall", "--no-build-isolation", ".")
            (PLACE / "source").write_text(source)
    return python


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    try:
        subprocess.run(command, cwd=ROOT, check=True)
    finally:
        shutil.rmtree(ROOT / "build", ignore_errors=True)  # a file deleted since would come back from there


def _digest(names: list[str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        if (ROOT / name).is_file() and "__pycache__" not in name:
            digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
    return digest.hexdigest()


def _stamp(name: str) -> str:
    path = PLACE / name
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    prepare()
    sys.exit(0)
