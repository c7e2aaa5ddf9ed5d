"""The real clients, three versions, each in a virtual environment of its own under `.venvs/`.

    python tests/conformance/environments.py

Made when missing; a lock keeps parallel test runs from making the same one twice.
"""

import fcntl
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = {"1": "1.109.1", "2": "2.54.0", "3": "3.54.0"}


def python_of(major: str) -> Path:
    """The interpreter that has this client; its environment is made if it is missing."""
    folder = ROOT / ".venvs" / f"openai-{major}"
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / f"openai-{major}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ready = folder / ".ready"
        if not ready.exists() or ready.read_text() != VERSIONS[major]:
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            pip = [folder / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
            subprocess.run([*pip, f"openai=={VERSIONS[major]}"], check=True)
            ready.write_text(VERSIONS[major])
    return folder / "bin" / "python"


if __name__ == "__main__":
    for name in VERSIONS:
        print(f"openai {VERSIONS[name]}: {python_of(name)}")
