"""The check of the download in a run: what it says, and what is left when it fails or the process dies."""

import json

import pytest

from lorainit.config.errors import ExportCheckFailed
from lorainit.config.events import Done, Message
from lorainit.export import outputs
from lorainit.run import run
from tests.lorainit.export.test_check import FILE, Q, in_file, silent


def test_after_a_failed_check_there_is_no_adapter_and_the_event_says_why(spec, tmp_path, monkeypatch):
    write = outputs.write_factors

    def wrong(job, layers, folder):
        rank = write(job, layers, folder)
        if folder.name == ".adapter-unproven":
            in_file(lambda t: t[f"{Q.format(0)}.lora_B.weight"].mul_(1.02))(folder)
        return rank

    monkeypatch.setattr(outputs, "write_factors", wrong)
    events = []
    (tmp_path / "adapter").mkdir()  # of an earlier run
    (tmp_path / "adapter" / FILE).write_text("old")
    with pytest.raises(ExportCheckFailed, match=f"untouched base: {Q.format(0)}: what it adds differs by 0.02"):
        run(spec(), tmp_path, events.append)
    assert not list(tmp_path.glob("*adapter*")) + list(tmp_path.glob(".adapter*"))
    assert not any(isinstance(event, Done) for event in events)
    (said,) = [e for e in events if isinstance(e, Message) and e.level == "error"]
    assert (said.data["kind"], said.data["passed"]) == ("export", False)


def test_a_crash_between_writing_and_checking_leaves_nothing_that_looks_complete(spec, tmp_path, monkeypatch):
    class Killed(BaseException):
        """As when the process dies: nothing is tidied up after it."""

    def die(run, folder, seen, *, beside):
        assert (folder / FILE).is_file()
        raise Killed

    monkeypatch.setattr(outputs, "verify", die)
    monkeypatch.setattr(outputs.shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.raises(Killed):
        run(spec(), tmp_path, silent)
    assert not (tmp_path / "adapter").exists()
    assert [path.name for path in tmp_path.glob(".adapter*")] == [".adapter-unproven"]


def test_what_the_run_says_of_its_check_is_what_the_manifest_and_the_result_say(spec, tmp_path):
    events = []
    done = run(spec(), tmp_path, events.append)
    manifest = json.loads((tmp_path / "adapter/manifest.json").read_text())
    assert manifest["export_check"] == done.export_check
    assert not list(tmp_path.glob(".*"))
    (said,) = [e for e in events if isinstance(e, Message) and e.message.startswith("Export check")]
    assert "14 layers add what was trained" in said.message
