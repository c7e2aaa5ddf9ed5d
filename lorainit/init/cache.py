"""What initializations found out, kept for the next run: evidence and starts."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lorainit.config.events import Event
from lorainit.data.dataset import Sample
from lorainit.init.evidence import Evidence, StepSearch
from lorainit.init.initialize import CachedStart
from lorainit.model.layers.factors import Factors
from lorainit.runtime.disk_cache import DiskCache, raw_bytes


@dataclass(frozen=True)
class Cache:
    """A folder of entries and the bytes that may be kept. `limit` 0 = nothing is kept."""

    folder: Path
    limit: int
    on_event: Callable[[Event], None]

    @property
    def _disk_cache(self) -> DiskCache:
        return DiskCache(self.folder, self.limit, self.on_event)

    def evidence(self, key: str) -> dict[str, Evidence] | None:
        """What `collect` returned under this key."""
        found = self._disk_cache.read(key)
        return found and {name: _evidence(entry) for name, entry in found.items()}

    def keep_evidence(self, key: str, evidence: Mapping[str, Evidence]) -> None:
        """Store it; a failure is a warning."""
        entries = {n: {f.name: getattr(e, f.name) for f in fields(e)} for n, e in evidence.items()}
        for entry in entries.values():
            entry["step"] = entry["step"] and asdict(entry["step"])
        self._disk_cache.write(key, entries)

    def starts(self, key: str) -> dict[str, CachedStart] | None:
        """The factors and report entries of all modules under this key."""
        found = self._disk_cache.read(key)
        return found and {n: CachedStart(Factors(A=e["A"], B=e["B"]), e["facts"]) for n, e in found.items()}

    def keep_starts(self, key: str, starts: Mapping[str, CachedStart]) -> None:
        """Store them; a failure is a warning."""
        entries = {n: {"A": k.factors.A, "B": k.factors.B, "facts": k.facts} for n, k in starts.items()}
        self._disk_cache.write(key, entries)


def _evidence(entry: dict[str, Any]) -> Evidence:
    return Evidence(**entry | {"step": entry["step"] and StepSearch(**entry["step"])})


def data_digest(samples: Sequence[Sample]) -> str:
    """The rows as a model sees them: tokens and which of them count."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample.ids).to_bytes(4, "big"))
        for tensor in (sample.ids, sample.trained):
            digest.update(raw_bytes(tensor))
    return digest.hexdigest()
