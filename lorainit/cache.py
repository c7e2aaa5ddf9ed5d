"""What earlier runs found out, on disk: evidence and starts, one safetensors file per entry.

Without locks: an entry is written beside and renamed into place, read through its own open file, and
evicted by unlinking the least recently used. Whatever is wrong with an entry makes it a miss, and
whatever keeps us from writing one costs the next run some time and this run nothing.
"""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from lorainit.data import Sample
from lorainit.events import Event, Message
from lorainit.evidence import Evidence, StepSearch
from lorainit.initialize import Known
from lorainit.methods import Factors

SUFFIX = ".safetensors"
STALE_SECONDS = 3600.0


@dataclass(frozen=True)
class Cache:
    """A folder of entries and the bytes they may take together. `limit` 0 = nothing is kept."""

    folder: Path
    limit: int
    on_event: Callable[[Event], None]

    def evidence(self, key: str) -> dict[str, Evidence] | None:
        """What `collect` returned under this key."""
        found = self._read(key)
        return found and {name: _evidence(entry) for name, entry in found.items()}

    def keep_evidence(self, key: str, evidence: Mapping[str, Evidence]) -> None:
        """Store it; a failure is a warning."""
        entries = {n: {f.name: getattr(e, f.name) for f in fields(e)} for n, e in evidence.items()}
        for entry in entries.values():
            entry["step"] = entry["step"] and asdict(entry["step"])
        self._write(key, entries)

    def starts(self, key: str) -> dict[str, Known] | None:
        """The factors and report entries of all modules under this key."""
        found = self._read(key)
        return found and {n: Known(Factors(A=e["A"], B=e["B"]), e["facts"]) for n, e in found.items()}

    def keep_starts(self, key: str, starts: Mapping[str, Known]) -> None:
        """Store them; a failure is a warning."""
        entries = {n: {"A": k.factors.A, "B": k.factors.B, "facts": k.facts} for n, k in starts.items()}
        self._write(key, entries)

    def _read(self, key: str) -> dict[str, Any] | None:
        path = self.folder / (key + SUFFIX)
        if not self.limit:
            return None
        try:
            # One open: `safe_open` opens a path twice, and another worker may evict it in between.
            content = path.read_bytes()
            metadata = _metadata(content)
            # Copies: BLAS rounds differently on memory aligned as the file happens to be.
            tensors = {name: tensor.clone() for name, tensor in load(content).items()}
            entry: dict[str, Any] = _unpack(json.loads(metadata["entry"]), _checked(tensors, metadata["sha256"]))
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
            self._warn(f"A cached initialization cannot be read and is made again: {error}.")
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return entry

    def _write(self, key: str, entry: Mapping[str, Any]) -> None:
        tensors: dict[str, Tensor] = {}
        packed = _pack(entry, tensors, {})
        if sum(t.nbytes for t in tensors.values()) > self.limit:
            return
        temporary = self.folder / f".{key}-{secrets.token_hex(8)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata={"entry": json.dumps(packed), "sha256": _digest(tensors)})
            temporary.replace(self.folder / (key + SUFFIX))
            self._evict(keep=key)
        except (SafetensorError, OSError) as error:
            self._warn(f"The initialization could not be cached: {error}.")
        finally:
            with suppress(OSError):
                temporary.unlink()

    def _evict(self, *, keep: str) -> None:
        """Let the least recently used go until the rest fits, and what crashed writers left."""
        entries = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                facts = path.stat()
                if path.suffix == SUFFIX and not path.name.startswith("."):
                    entries.append((path.stem == keep, facts.st_mtime_ns, facts.st_size, path))
                elif path.name.startswith(".") and time.time() - facts.st_mtime > STALE_SECONDS:
                    path.unlink()
        total = sum(size for _, _, size, _ in entries)
        for _, _, size, path in sorted(entries):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _warn(self, text: str) -> None:
        self.on_event(Message(level="warn", message=text, data={"kind": "init"}))


def _evidence(entry: dict[str, Any]) -> Evidence:
    return Evidence(**entry | {"step": entry["step"] and StepSearch(**entry["step"])})


# --- keys --------------------------------------------------------------------------------------


def key(**parts: Any) -> str:
    """The name of an entry: everything that shapes it, the code included."""
    text = json.dumps({**parts, "code": code_version()}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def data_digest(samples: Sequence[Sample]) -> str:
    """The rows as a model sees them: tokens and which of them count."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample.ids).to_bytes(4, "big"))
        for tensor in (sample.ids, sample.trained):
            digest.update(_bytes(tensor))
    return digest.hexdigest()


@cache
def code_version() -> str:
    """A digest of this package's sources and torch's version: any change makes every entry a miss."""
    digest = hashlib.sha256(torch.__version__.encode())
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


# --- entries as named tensors and JSON ---------------------------------------------------------


def _pack(value: Any, tensors: dict[str, Tensor], seen: dict[int, str]) -> Any:
    """JSON with `{"tensor": name}` for tensors; one that several modules share is stored once."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = str(len(tensors))
            # A copy where two entries look into one storage: the format has no views.
            tensors[seen[id(value)]] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": seen[id(value)]}
    if isinstance(value, Mapping):
        return {"object": {name: _pack(part, tensors, seen) for name, part in value.items()}}
    if isinstance(value, tuple):
        return {"tuple": [_pack(part, tensors, seen) for part in value]}
    if isinstance(value, list):
        return [_pack(part, tensors, seen) for part in value]
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "tuple":
        return tuple(_unpack(part, tensors) for part in inner)
    return {name: _unpack(part, tensors) for name, part in inner.items()}


def _metadata(content: bytes) -> dict[str, str]:
    """The free text of a safetensors file, which `load` leaves out. The header: 8 bytes of length, then JSON."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    found: dict[str, str] = header["__metadata__"]
    return found


def _checked(tensors: dict[str, Tensor], sha256: str) -> dict[str, Tensor]:
    if _digest(tensors) != sha256:
        raise ValueError("its bytes are not those that were written")
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
