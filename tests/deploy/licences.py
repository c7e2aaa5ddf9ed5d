"""`make licences`: the licence of every installed package, as its own metadata has it. Needs no network.

Exit code 1 if one is unknown, or is none that may come with a product under Apache-2.0. It reads what packages say of
themselves, not their code.
"""

import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageMetadata, distributions

# Words of SPDX expressions and of older metadata.
ALLOWED = (
    "apache|mit|bsd|isc|iscl|psf|python software foundation|python-2|cnri|mpl|mozilla public|unlicense|0bsd|zlib"
    # The Lesser GPL asks for nothing where a package is imported as it is.
    "|hpnd|cc0|ofl|bsl|boost|postgresql|public domain|lgpl|lesser general public"
)
FORBIDDEN = "gpl|general public|agpl|affero|sspl|busl|commons clause|proprietary|non-?commercial"
NO_LICENCE = "|dfsg approved|osi approved"  # classifiers that name none
OURS = "lorainit"
# They come with torch's builds for their GPUs alone; whoever installs those takes their maker's terms.
OF_NVIDIA = ("nvidia-", "cuda-")


def licence_of(metadata: PackageMetadata) -> str:
    """What a package says its licence is, on one line; empty if it says nothing."""
    classifiers = metadata.get_all("Classifier", [])
    classified = [line.rpartition("::")[2].strip() for line in classifiers if "License ::" in line]
    (expression, *_), (free_text, *_) = (metadata.get_all(name, [""]) for name in ("License-Expression", "License"))
    licence = expression or "; ".join(classified) or free_text
    return next((line.strip() for line in licence.splitlines() if line.strip()), "")


def fault(licence: str) -> str:
    """Why this licence is not to be installed; empty if nothing is wrong. Of `A OR B` one that is allowed is enough."""
    choices = (_fault_of_all(re.split(r"\s+and\s+|;\s*", choice)) for choice in re.split(r"\s+or\s+", licence.lower()))
    return min(choices)


def _fault_of_all(parts: list[str]) -> str:
    named = [part for part in parts if not re.fullmatch(NO_LICENCE, part.strip())]
    return max(map(_fault, named), default="unknown")


def _fault(part: str) -> str:
    strict = re.sub(r"lgpl|lesser general public", "", part)
    if re.search(rf"\b(?:{FORBIDDEN})", strict):
        return "forbidden"
    return "" if re.search(rf"\b(?:{ALLOWED})\b", part) else "unknown"


def listed() -> Iterator[tuple[str, str, str, str]]:
    """Name, version, licence and fault of each package of this Python, by name."""
    found = {one.metadata["Name"].lower(): one for one in distributions()}
    for name in sorted(found.keys() - {OURS}):
        licence = licence_of(found[name].metadata)
        yield name, found[name].version, licence, "" if name.startswith(OF_NVIDIA) else fault(licence)


def main() -> int:
    """Print the list."""
    rows = list(listed())
    for name, version, licence, why in rows:
        print(f"{name:42} {version:20} {licence[:80] or '-'}{f'   <-- {why}' if why else ''}")
    return int(any(why for *_, why in rows))


if __name__ == "__main__":
    sys.exit(main())
