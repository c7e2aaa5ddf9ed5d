"""Every kind of the zoo by name, and the one function that makes it: no hub, no download, no pretrained weights."""

from pathlib import Path

from tests.zoo.dense import DENSE
from tests.zoo.hybrids import HYBRIDS
from tests.zoo.kind import Kind
from tests.zoo.mixtures import MIXTURES
from tests.zoo.refused import HOSTILE, INCOMPLETE, NOT_CAUSAL, VISION

KINDS: dict[str, Kind] = {**DENSE, **MIXTURES, **HYBRIDS, **NOT_CAUSAL, **VISION, **INCOMPLETE, **HOSTILE}


def make(kind: str, folder: Path) -> Path:
    """Write the base of this kind.

    Args:
        folder: made if absent; should be empty.

    Returns:
        What to pass as `source`: the folder, or for GGUF kinds a file in it.

    Raises:
        LookupError: this transformers has no such architecture (`KINDS[kind].missing`).
    """
    if why := KINDS[kind].missing:
        raise LookupError(why)
    folder.mkdir(parents=True, exist_ok=True)
    return KINDS[kind].make(folder)
