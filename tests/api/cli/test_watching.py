"""What `lorainit watch` says last of a job that succeeded, and its exit code."""

import pytest
from openai.types.fine_tuning import FineTuningJob
from typer.testing import CliRunner

from api.cli import commands, tables

WORSE = {"code": "worse_than_base", "message": "Loss [1.73] is above 1.69.", "data": {"start": 1.69, "end": 1.73}}


@pytest.mark.parametrize(("warnings", "code"), [([], 0), ([WORSE], 3)])
def test_a_job_that_made_the_model_worse_is_exit_code_3(
    monkeypatch: pytest.MonkeyPatch, warnings: list[dict[str, object]], code: int
) -> None:
    ended = FineTuningJob.model_construct(status="succeeded", fine_tuned_model="ft:x", warnings=warnings)  # type: ignore[call-arg]
    monkeypatch.setattr("api.cli.watch.watch", lambda *_: ended)
    monkeypatch.setattr("api.cli.client.connect", lambda: None)
    done = CliRunner().invoke(commands.app, ["watch", "ftjob-1"])
    assert done.exit_code == code
    last = done.stderr.splitlines()[-1]
    assert last == (
        f"{WORSE['code']}: {WORSE['message']}" if code else "succeeded: ft:x. Get it: lorainit download ftjob-1"
    )


@pytest.mark.parametrize(("warnings", "shown"), [([], "ft:x"), ([WORSE], "ft:x (worse_than_base)"), (None, "ft:x")])
def test_the_list_of_jobs_shows_the_warnings_of_each(warnings: list[dict[str, object]] | None, shown: str) -> None:
    given = {"id": "ftjob-1", "status": "succeeded", "model": "m", "fine_tuned_model": "ft:x", "warnings": warnings}
    assert tables.make_job_row(FineTuningJob.model_construct(**given))[-1] == shown
