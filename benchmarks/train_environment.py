"""The trainers we are measured against, in an environment of their own: `.venvs/competitors`.

    python benchmarks/train_environment.py

Made when missing or when a version changes; no part of `make setup`, `make test` or the product. It has nothing
of ours in it: the competitors' process reads token ids from a file.
"""

import fcntl
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = ROOT / ".venvs" / "competitors"
# Whatever both sides use (torch, transformers, PEFT, accelerate) has the version that the product is tested with.
PACKAGES = {"trl": "1.16.0", "datasets": "5.2.0"}
SHARED = ["transformers", "peft", "accelerate", "safetensors"]


def competitors() -> Path:
    """The interpreter that has them."""
    PLACE.parent.mkdir(exist_ok=True)
    constraints = ROOT / "constraints.txt"
    stamp, wanted = PLACE / ".ready", f"{PACKAGES}\n{constraints.read_text()}"
    with PLACE.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            print("preparing the competitors' environment ...", flush=True)
            subprocess.run([sys.executable, "-m", "venv", "--clear", PLACE], check=True)
            # By itself and first: TRL's own resolution would take a torch with gigabytes of CUDA packages.
            _install("torch", constraints=constraints)
            _install(*SHARED, *(f"{name}=={version}" for name, version in PACKAGES.items()), constraints=constraints)
            stamp.write_text(wanted)
    return PLACE / "bin" / "python"


def _install(*packages: str, constraints: Path) -> None:
    pip = [str(PLACE / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, *packages, "--constraint", str(constraints)], check=True)


if __name__ == "__main__":
    print(competitors())
