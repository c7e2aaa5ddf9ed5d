"""What a process writes is its own account's, also in a folder that was there before."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from api.core.maintenance import startup
from api.core.maintenance.startup import OpenFolder, make_private


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder that anybody can read, with a database in it."""
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "lorainit.db").write_bytes(b"rows")
    for path in (folder / "lorainit.db", folder):
        path.chmod(0o755)
    return folder


def test_a_folder_that_is_made_is_private(tmp_path: Path) -> None:
    make_private(tmp_path / "new" / "state")
    assert mode(tmp_path / "new" / "state") == 0o700


def test_a_folder_that_was_open_is_closed(state: Path) -> None:
    make_private(state)
    assert mode(state) == 0o700


def test_in_a_folder_of_somebody_elses_what_lies_there_is_closed(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chmod = Path.chmod
    monkeypatch.setattr(Path, "chmod", lambda path, mode: chmod(path, mode) if path != state else not_ours())
    make_private(state)
    assert (mode(state), mode(state / "lorainit.db")) == (0o755, 0o700)


def not_ours() -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("answer", [not_ours, lambda: None], ids=["not ours", "no modes on this disk"])
def test_what_cannot_be_closed_is_refused_with_advice(
    state: Path, monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    monkeypatch.setattr(Path, "chmod", lambda *_: answer())  # type: ignore[operator]
    with pytest.raises(OpenFolder, match=r"lorainit\.db.*chmod -R go=.*LORAINIT_STATE_DIR"):
        make_private(state)


def test_a_folder_for_everybody_is_refused_and_stays_as_it_is(state: Path) -> None:
    state.chmod(0o1777)
    with pytest.raises(OpenFolder, match="LORAINIT_STATE_DIR"):
        make_private(state)
    assert (mode(state), mode(state / "lorainit.db")) == (0o1777, 0o755)


def test_what_a_process_of_the_service_writes_is_its_accounts_alone(state: Path) -> None:
    code = "from pathlib import Path; import sys; from api.core.maintenance import startup; startup.check_or_exit();"
    code += " p = Path(sys.argv[1]); (p / 'runs').mkdir(); (p / 'runs' / 'rows').touch()"
    environment = {**os.environ, "LORAINIT_STATE_DIR": str(state)}
    subprocess.run([sys.executable, "-c", code, str(state)], env=environment, umask=0o022, check=True)
    assert [mode(path) & startup.OTHERS for path in (state, state / "runs", state / "runs" / "rows")] == [0, 0, 0]
