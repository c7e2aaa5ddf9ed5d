"""The command line at a server: orders, follows, cancels, downloads; errors are one readable line."""

import json
import tomllib
from pathlib import Path

import pytest
from openai import OpenAI
from transformers import AutoConfig

from tests import hub
from tests.api.cli.conftest import Served, called, environment, lorainit

TINY = ("--model", "tiny", "--r", "4")


def one_error(done: "object") -> str:
    """The one line a refused command leaves, with nothing on standard output."""
    assert done.returncode == 1  # type: ignore[attr-defined]
    assert done.stdout == ""  # type: ignore[attr-defined]
    lines = done.stderr.splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def test_an_order_is_followed_and_its_adapter_downloaded(served: Served, rows: Path, tmp_path: Path) -> None:
    options = ("--init", "loram", "--validation", str(rows), "--lr", "0.01", "--steps", "3", "--suffix", "cli")
    done = served.run_alone("submit", str(rows), *TINY, *options, "--batch", "4", "--seed", "7", "--watch")
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    assert job.startswith("ftjob-")
    assert "Created fine-tuning job" in done.stderr
    assert "Step 3/3: training loss=" in done.stderr
    assert "succeeded: ft:tiny:local:cli:" in done.stderr

    listed = served.run("list").stdout
    assert listed.splitlines()[1].split()[:6] == [job, "succeeded", "100", "tiny", "loram", "4"]

    folder = tmp_path / "adapter"
    assert served.run("download", job, str(folder)).stdout.strip() == str(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8  # 2r: the start is subtracted
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    names_no_model_of_a_hub(folder)
    assert "exists already" in one_error(served.run("download", job, str(folder)))
    assert "has already succeeded" in one_error(served.run("cancel", job))


def names_no_model_of_a_hub(adapter: Path) -> None:
    """The download of a base in a folder leads nobody to a stranger's model of the same name."""
    page = (adapter / "README.md").read_text()
    assert "base_model:" not in page
    assert "The base model is on no hub" in page
    with pytest.raises(OSError, match="local:model"):
        AutoConfig.from_pretrained(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])


def test_an_entry_means_the_same_from_everywhere(catalogue: Path, tiny: Path) -> None:
    folder, of_hub = tomllib.loads(catalogue.read_text())["models"]
    assert (folder["source"], folder["root"]) == (str(tiny), "local:model")
    assert (of_hub["source"], of_hub["root"]) == (
        f"hub:Lab/Mixture@{hub.commit(tiny.parent / 'mixture')}",
        "Lab/Mixture",
    )


def test_a_root_or_an_id_that_is_none_is_refused(tiny: Path) -> None:
    for option, wrong in (("--root", "tiny"), ("--id", "ti ny")):
        options = {"--id": "tiny", option: wrong}
        refused = called("models", "inspect", str(tiny), *(part for pair in options.items() for part in pair))
        assert one_error(refused).startswith(f"{option} must be ")


def test_an_order_may_ask_for_a_group_and_an_end_token(served: Served, rows: Path) -> None:
    with OpenAI(base_url=served.url, api_key=served.key) as client:
        for options, wanted in (((), False), (("--group", "--append-eos"), True)):
            job = served.run("submit", str(rows), *TINY, "--steps", "1", "--device", "nowhere", *options).stdout.strip()
            shown = client.fine_tuning.jobs.retrieve(job)
            client.fine_tuning.jobs.cancel(job)
            assert shown.resources["group"] is wanted  # type: ignore[attr-defined]
            assert shown.append_eos is wanted  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text",
    [
        '{"messages": []}\n' * 3,
        *(pytest.param(text, marks=pytest.mark.slow) for text in ("a,b\n1,2\n", "[1]", "\x00", "\n\n")),
    ],
)  # what is no row: tests/lorainit/data
def test_a_file_that_is_no_training_file_is_exit_code_1_with_its_reason(
    text: str, served: Served, rows: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text)
    assert "(code invalid_training_file, param training_file)" in one_error(served.run("submit", str(bad), *TINY))
    wrong = served.run("submit", str(rows), *TINY, "--validation", str(bad))
    assert "(code invalid_validation_file, param validation_file)" in one_error(wrong)


def test_a_job_that_did_not_succeed_is_exit_code_1(served: Served, rows: Path) -> None:
    job = served.run("submit", str(rows), *TINY, "--device", "nowhere").stdout.strip()
    served.run("cancel", job)
    done = served.run("watch", job)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, f"error: job {job} cancelled")


def test_a_refusal_names_code_and_field(served: Served, rows: Path) -> None:
    error = one_error(served.run("submit", str(rows), "--model", "gpt-4o"))
    assert "Available: tiny, tiny-moe" in error
    assert error.endswith("(code model_not_available, param model)")
    error = one_error(served.run("submit", str(rows), *TINY, "--precision", "fp16"))
    assert "method.supervised.hyperparameters.precision" in error
    error = one_error(served.run("submit", str(rows), *TINY, "--init", '{"method": "pissa", "niter": 99}'))
    assert error.endswith("(code invalid_value, param lora.init.niter)")


def test_an_unknown_job_is_said_to_be_unknown(served: Served) -> None:
    for command in ("watch", "cancel", "download"):
        assert "code fine_tune_not_found" in one_error(served.run(command, "ftjob-000000000000000000000000"))


def test_a_missing_file_is_named_before_anything_is_sent(served: Served, tmp_path: Path) -> None:
    assert (
        one_error(served.run("submit", str(tmp_path / "no.jsonl"), *TINY)) == f"{tmp_path / 'no.jsonl'} is not a file."
    )


def test_an_init_that_is_no_json_is_refused(served: Served, rows: Path) -> None:
    assert one_error(served.run("submit", str(rows), *TINY, "--init", "{pissa}")).startswith("--init is not JSON")


def test_the_methods_of_the_server_are_listed(served: Served) -> None:
    here, there = called("methods"), served.run("methods")
    assert here.stdout == there.stdout != ""


@pytest.mark.parametrize("option", ["--project", "--name"])
@pytest.mark.parametrize("text", ["", "  ", "a\nb", "x" * 256])
def test_a_name_that_is_none_is_refused(option: str, text: str, served: Served) -> None:
    refused = called("keys", "create", "--state", str(served.state), option, text)
    assert one_error(refused).startswith(f"{option} must be a name of 1 to 255 printable characters")


def test_an_address_without_v1_is_told_so(served: Served) -> None:
    bare = environment(OPENAI_BASE_URL=served.url.removesuffix("/v1"), OPENAI_API_KEY=served.key)
    assert "the base URL of this API ends in /v1." in one_error(called("list", env=bare))


@pytest.mark.parametrize("command", [("serve",), ("migrate",), ("keys", "list"), ("keys", "create")])
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"DATABASE_URL": "postgresql://me:swordfish@127.0.0.1:9/x"}, "me:***@127.0.0.1:9/x cannot be used: "),
        ({"PORT": "abc"}, "LORAINIT_PORT: must be a valid integer"),
    ],
)
def test_what_the_host_lacks_is_one_line(
    command: tuple[str, ...], variables: dict[str, str], words: str, tmp_path: Path
) -> None:
    env = environment(**{f"LORAINIT_{name}": value for name, value in variables.items()})
    run = lorainit if command == ("serve",) else called
    error = one_error(run(*command, "--state", str(tmp_path / "state"), env=env))
    assert words in error
    assert "swordfish" not in error


@pytest.mark.parametrize("name", ["OPENAI_BASE_URL", "OPENAI_API_KEY"])
def test_without_an_address_or_a_key_nothing_is_sent_anywhere(name: str) -> None:
    both = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_API_KEY": "sk-x"}
    del both[name]
    assert one_error(called("list", env=environment(**both))).startswith(f"{name} is not set.")


def test_a_server_that_is_not_there_is_one_line() -> None:
    gone = environment(OPENAI_BASE_URL="http://127.0.0.1:9/v1", OPENAI_API_KEY="sk-x")
    assert one_error(called("list", env=gone)).startswith("no usable answer from http://127.0.0.1:9/v1")


def test_a_new_key_works_and_is_alone_on_standard_output(served: Served) -> None:
    made = called("keys", "create", "--state", str(served.state), "--project", "other")
    key = made.stdout.strip()
    assert made.stdout == f"{key}\n"
    listed = called("list", env=environment(OPENAI_BASE_URL=served.url, OPENAI_API_KEY=key))
    assert listed.returncode == 0
    assert "ftjob-" not in listed.stdout  # another project


def test_a_key_that_no_header_can_carry_is_told_in_one_line() -> None:
    env = environment(OPENAI_BASE_URL="http://127.0.0.1:9/v1", OPENAI_API_KEY="sk-é")
    assert "OPENAI_API_KEY" in one_error(called("list", env=env))


def test_a_key_for_a_service_that_never_ran_is_refused(tmp_path: Path) -> None:
    assert "no database at" in one_error(called("keys", "create", "--state", str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()


def test_migrations_lead_to_the_tables_in_code() -> None:
    assert called("migrate", "--check").stdout.strip() == "migrations and tables agree"


def test_migrations_are_undone_down_to_a_revision_and_done_again(tmp_path: Path) -> None:
    state = ("--state", str(tmp_path / "state"))
    called("migrate", *state)
    assert "database at revision c4f1a96e07d3" in called("migrate", "--back-to", "c4f1a96e07d3", *state).stdout
    assert "no database at" in one_error(called("keys", "list", *state))
    assert "'nothing'" in one_error(called("migrate", "--back-to", "nothing", *state))
    assert "newest revision" in called("migrate", *state).stdout


def test_a_model_that_is_none_gets_no_entry(tmp_path: Path) -> None:
    done = called("models", "inspect", str(tmp_path), "--id", "x")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "cannot be used as a base model" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_doctor_says_what_a_run_would_choose_here_and_changes_nothing_where_no_service_was_started(
    tmp_path: Path,
) -> None:
    done = called("doctor", "--state", str(tmp_path / "new"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fp32 products" in done.stdout
    assert "absent  database" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # with an examination that is made up: tests/api/cli/test_doctor.py
def test_the_doctor_tells_programs_the_same(tmp_path: Path) -> None:
    report = json.loads(lorainit("doctor", "--json", "--state", str(tmp_path / "new")).stdout)
    assert {"ok", "checks", "machine", "packages", "choices"} == set(report)
