"""Base models of a hub, fetched by the hub's own client from a server on loopback that speaks its routes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorainit.config.sources import as_hub_id, is_root, make_absolute
from lorainit.model.source import hub as fetching
from tests import hub

FIND = (
    "import json, sys; from lorainit.model.source.find import find; from lorainit.config.errors import LorainitError\n"
    "try:\n found = find(sys.argv[1]); answer = [found.source, str(found.path), found.hub_id]\n"
    "except LorainitError as error:\n answer = f'{error.code}: {error.message}'\n"
    "print(json.dumps(answer))"
)


@pytest.fixture(scope="module")
def served(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[hub.Hub]:
    """Models for everybody, for some, and a second revision of one."""
    old = tmp_path_factory.mktemp("hub") / "old"
    shutil.copytree(bases["llama"], old)
    (old / "README.md").write_text("The first try.")
    # What others keep beside a model, and what must never be fetched.
    for name in ("onnx/model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "modeling_tiny.py"):
        (old / name).parent.mkdir(exist_ok=True)
        (old / name).write_bytes(b"0")
    everybody = hub.Repository({"main": bases["llama"], "v1": old})
    models = {
        "Lab/Tiny": everybody,
        "Lab/Secret": hub.Repository({"main": bases["llama"]}, private=True),
        "Lab/Gated": hub.Repository({"main": bases["llama"]}, gated=True),
    } | {f"Lab/S{status}": hub.Repository({}, status=status) for status in (401, 403, 429, 503)}
    with hub.serving(models) as running:
        yield running


def ask(source: str, at: hub.Hub, home: Path, **env: str) -> tuple[str, Path, str | None] | str:
    """What `find` answers in a process of its own, for the client reads its settings when it is loaded."""
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env = {**kept, "HF_ENDPOINT": at.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env}
    path = {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", FIND, source]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**env, **path}, cwd=home)
    answer = json.loads(done.stdout)
    return answer if isinstance(answer, str) else (answer[0], Path(answer[1]), answer[2])


def test_an_id_is_fetched_where_no_such_folder_is(served: hub.Hub, bases: dict[str, Path], tmp_path: Path) -> None:
    source, path, name = ask("Lab/Tiny", served, tmp_path)
    commit = hub.commit(bases["llama"])
    assert (source, name, path.name) == (f"hub:Lab/Tiny@{commit}", "Lab/Tiny", commit)
    assert (path / "model.safetensors").read_bytes() == (bases["llama"] / "model.safetensors").read_bytes()

    (tmp_path / "Lab" / "Tiny").mkdir(parents=True)
    assert ask("Lab/Tiny", served, tmp_path) == (str(tmp_path / "Lab/Tiny"), tmp_path / "Lab/Tiny", None)
    assert ask("hub:Lab/Tiny", served, tmp_path)[2] == "Lab/Tiny"


def test_a_revision_is_fetched_without_the_files_of_others(served: hub.Hub, tmp_path: Path) -> None:
    _, path, _ = ask("Lab/Tiny@v1", served, tmp_path)
    names = {file.name for file in path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert names.isdisjoint({"onnx", "consolidated.safetensors", "pytorch_model.bin", "modeling_tiny.py", "README.md"})


def test_what_is_in_the_cache_needs_no_hub(served: hub.Hub, tmp_path: Path) -> None:
    source, path, _ = ask("Lab/Tiny", served, tmp_path)
    asked = len(served.asked)
    assert ask(source, served, tmp_path)[1] == path  # a commit: nothing is looked up again
    assert ask("Lab/Tiny", served, tmp_path, HF_HUB_OFFLINE="1")[1] == path
    assert len(served.asked) == asked
    assert fetching.id_of(path) == "Lab/Tiny"  # also when the folder itself is given
    assert ask(str(path), served, tmp_path) == (str(path), path, "Lab/Tiny")


@pytest.mark.parametrize(
    ("source", "env", "words"),
    [
        ("hub:Lab/None", {}, "has no model Lab/None, or it is private and HF_TOKEN is not set"),
        ("hub:Lab/Secret", {}, "has no model Lab/Secret, or it is private and HF_TOKEN is not set"),
        ("hub:Lab/Secret", {"HF_TOKEN": "hf_of_a_stranger"}, "or the token may not see it"),
        ("hub:Lab/Gated", {}, "is gated: accept its terms on its page"),
        ("hub:Lab/Tiny@v9", {}, "has no revision 'v9'"),
        ("hub:Lab/Tiny", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, and the cache"),
        ("hub:Lab/S403", {}, "forbids Lab/S403 to the account of this HF_TOKEN"),
        ("hub:tiny", {}, "'hub:tiny' is not hub:OWNER/NAME[@REVISION]"),
        ("Lab/None", {}, "There is no folder {here}/Lab/None. The hub (http"),
        ("tiny", {}, "There is no base model at 'tiny' ({here}/tiny); a model of a hub is OWNER/NAME"),
        ("./Lab/Tiny", {}, "There is no base model at './Lab/Tiny'"),
    ],
)
def test_what_cannot_be_had_is_told_with_what_would_help(
    source: str, env: dict[str, str], words: str, served: hub.Hub, tmp_path: Path
) -> None:
    said = ask(source, served, tmp_path, **env)
    assert isinstance(said, str)
    assert said.startswith("unsupported_model: ")
    assert words.format(here=tmp_path) in said


@pytest.mark.parametrize(
    ("source", "env", "words"),
    [
        ("hub:Lab/Tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be fetched from http://127.0.0.1:9: "),
        ("hub:Lab/S503", {}, "The hub's model Lab/S503 cannot be fetched from http"),
        ("Lab/S429", {}, "There is no folder {here}/Lab/S429. The hub's model Lab/S429 cannot be fetched"),
    ],
)
def test_trouble_of_the_network_or_of_the_hub_is_told_as_what_may_pass(
    source: str, env: dict[str, str], words: str, served: hub.Hub, tmp_path: Path
) -> None:
    said = ask(source, served, tmp_path, **env)
    assert isinstance(said, str)
    assert said.startswith("hub_unavailable: ")
    assert words.format(here=tmp_path) in said


def test_a_token_opens_what_is_private_or_gated(served: hub.Hub, tmp_path: Path) -> None:
    for name in ("Lab/Secret", "Lab/Gated"):
        assert ask(name, served, tmp_path, HF_TOKEN=hub.TOKEN)[2] == name


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("a/b", True),
        ("local:tiny", True),
        ("tiny", False),
        ("/models/tiny", False),
        ("a/b/c", False),
        ("../tiny", False),
        ("a/b--c", False),
        ("local:", False),
        ("-a/b", False),
        ("a/b\n", False),
    ],
)
def test_a_root_is_a_hub_id_or_what_no_hub_can_have(name: str, known: bool) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    assert is_root(name) is known
    if name.startswith("local:"):
        with pytest.raises(HFValidationError):
            validate_repo_id(name)
    elif known:
        validate_repo_id(name)


def test_a_hub_source_has_a_revision_or_none() -> None:
    assert as_hub_id("hub:a/b@refs/pr/1") == ("a/b", "refs/pr/1")
    assert as_hub_id("a/b") == ("a/b", None)
    assert as_hub_id("/a/b") is None
    assert make_absolute("hub:a/b", folder=Path("/x")) == "hub:a/b"
    assert make_absolute("a/b", folder=Path("/x")) == "/x/a/b"
    assert make_absolute("/a/b", folder=Path("/x")) == "/a/b"
