"""A cache on disk for results of earlier runs: named tensors and JSON, one safetensors file per entry.

It needs no locks, because an entry is written under another name and renamed when it is complete, and is read with a
single open. The least recently used entries are deleted. A damaged entry counts as missing. If an entry cannot be
written, a warning is emitted and the next run computes it again. What entries contain is decided in
`lorainit.init.cache` and `lorainit.data.tokens`.
"""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from lorainit.config.cache_names import SUFFIX
from lorainit.config.events import Event, Message

STALE_SECONDS = 3600.0
MAX_JSON = 32 << 20  # the format allows 100 MB of header, and quoting the JSON into it makes it longer
# Neighbouring folders that share one limit of bytes, and what messages call an entry of each.
KINDS = {"init": "initialization", "tokens": "tokenized file", "bases": "digest of a base model"}


@dataclass(frozen=True)
class DiskCache:
    """A folder of entries, named as one of `KINDS`. `limit`: bytes of all kinds together; 0 = the cache is off."""

    folder: Path
    limit: int
    on_event: Callable[[Event], None]

    def read(self, key: str) -> dict[str, Any] | None:
        """The entry under this key; None if there is none, or if it is damaged."""
        path = self.folder / (key + SUFFIX)
        if not self.limit:
            return None
        try:
            # `safe_open` is not used because it opens the path twice, and another worker may delete it in between.
            content = path.read_bytes()
            metadata = _metadata(content)
            # Copied, because BLAS rounds differently depending on alignment, and tensors of a file have any alignment.
            tensors = {name: tensor.clone() for name, tensor in load(content).items()}
            packed = _checked(metadata["entry"], tensors, metadata["sha256"])
            entry: dict[str, Any] = _unpack(json.loads(packed), tensors)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
            self._warn(f"A cached {self._noun} cannot be read and is made again: {error}.")
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return entry

    def write(self, key: str, entry: Mapping[str, Any]) -> None:
        """Store an entry, unless it is too large. A failure is only a warning, because a run never needs the cache."""
        if not self.limit:
            return
        tensors: dict[str, Tensor] = {}
        packed = json.dumps(_pack(entry, tensors, {}))
        if len(packed) > MAX_JSON or sum(t.nbytes for t in tensors.values()) + len(packed) > self.limit:
            return
        temporary = self.folder / f".{key}-{secrets.token_hex(8)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata={"entry": packed, "sha256": _digest(packed, tensors)})
            temporary.replace(self.folder / (key + SUFFIX))
            self._evict(keep=key)
        except (SafetensorError, OSError) as error:
            self._warn(f"The {self._noun} could not be cached: {error}.")
        finally:
            with suppress(OSError):
                temporary.unlink()

    def _evict(self, *, keep: str) -> None:
        """Delete the least recently used entries until the rest fits, and old temporary files of crashed writers.

        `keep` sorts last, so that the entry just written is not deleted.
        """
        entries = []
        for path in self._files():
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

    def _files(self) -> Iterator[Path]:
        for kind in KINDS:
            folder = self.folder.parent / kind
            if folder.is_dir():
                yield from folder.iterdir()

    @property
    def _noun(self) -> str:
        return KINDS[self.folder.name]

    def _warn(self, text: str) -> None:
        kind = "init" if self.folder.name == "init" else "data"
        self.on_event(Message(level="warn", message=text, data={"kind": kind}))


def make_key(**parts: Any) -> str:
    """The key of an entry: a digest of everything that its content depends on, the code included."""
    text = json.dumps({**parts, "code": code_version()}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


@cache
def code_version() -> str:
    """A digest of this package's sources and torch's version, so that no entry survives a change of the code."""
    digest = hashlib.sha256(torch.__version__.encode())
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


# --- entries as named tensors and JSON ---------------------------------------------------------


def _pack(value: Any, tensors: dict[str, Tensor], seen: dict[int, str]) -> Any:
    """The entry as JSON, with `{"tensor": name}` in place of tensors. A tensor that occurs twice is stored once."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = str(len(tensors))
            # Copied, because safetensors refuses tensors that share memory, as views of one tensor do.
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
    """The metadata of a safetensors file, read here because `load` does not return them.

    The file begins with 8 bytes for the header's length and then the header as JSON.
    """
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    found: dict[str, str] = header["__metadata__"]
    return found


def _checked(packed: str, tensors: Mapping[str, Tensor], sha256: str) -> str:
    if _digest(packed, tensors) != sha256:
        raise ValueError("its bytes are not those that were written")
    return packed


def _digest(packed: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(packed.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(raw_bytes(tensors[name]))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values in order, for a digest."""
    return tensor.flatten().view(torch.uint8).numpy().data
