"""A cache on disk for evidence and starts, because both may take minutes and depend only on base, data and method."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lorainit.data.dataset import Sample
from lorainit.init.evidence import Evidence, StepSearch
from lorainit.init.initialize import CachedStart
from lorainit.model.layers.factors import Factors
from lorainit.runtime.disk_cache import DiskCache, raw_bytes


@dataclass(frozen=True)
class Cache:
    """Evidence and starts as entries of a cache on disk."""

    entries: DiskCache

    def read_evidence(self, key: str) -> dict[str, Evidence] | None:
        """The evidence stored under this key, by module; None if there is none."""
        found = self.entries.read(key)
        return found and {name: _evidence(entry) for name, entry in found.items()}

    def keep_evidence(self, key: str, evidence: Mapping[str, Evidence]) -> None:
        """Store the evidence. A failure is only a warning, because the run does not need the cache."""
        layers = {n: {f.name: getattr(e, f.name) for f in fields(e)} for n, e in evidence.items()}
        for layer in layers.values():
            layer["step"] = layer["step"] and asdict(layer["step"])
        self.entries.write(key, layers)

    def read_starts(self, key: str) -> dict[str, CachedStart] | None:
        """The factors and report entries stored under this key, by module; None if there are none."""
        found = self.entries.read(key)
        return found and {n: CachedStart(Factors(A=e["A"], B=e["B"]), e["facts"]) for n, e in found.items()}

    def keep_starts(self, key: str, starts: Mapping[str, CachedStart]) -> None:
        """Store the starts. A failure is only a warning, because the run does not need the cache."""
        layers = {n: {"A": k.factors.A, "B": k.factors.B, "facts": k.facts} for n, k in starts.items()}
        self.entries.write(key, layers)


def _evidence(entry: dict[str, Any]) -> Evidence:
    return Evidence(**entry | {"step": entry["step"] and StepSearch(**entry["step"])})


def data_digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of the rows as a model sees them: token ids, and which tokens are trained."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample.ids).to_bytes(4, "big"))  # otherwise rows cut at other places could be the same bytes
        for tensor in (sample.ids, sample.trained):
            digest.update(raw_bytes(tensor))
    return digest.hexdigest()
