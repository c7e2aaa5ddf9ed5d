"""Memory that runs out in mid-run: the work is done again in smaller passes, or ends with its own code."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lorainit.config.errors import OutOfMemory
from lorainit.config.events import Checkpoint, Done, Message, Metrics
from lorainit.context import Request
from lorainit.run import run, run_together
from lorainit.train import course
from tests.lorainit.ranks import run_ranks
from tests.lorainit.shortage import TOKENS, Memory, adapter, after, close, told, until_export


@pytest.mark.parametrize("limit", [80, 40])
def test_memory_that_runs_out_in_the_middle_halves_passes_and_the_step_is_done_again(
    wanted, tmp_path, monkeypatch, limit
):
    plain = run(wanted(), tmp_path / "plain", lambda event: None)
    memory, heard = Memory(monkeypatch), []
    cut = run(wanted(), tmp_path / "cut", after(2, memory, heard, limit=limit))
    facts = told(heard)
    assert limit // 2 < facts[-1][TOKENS] <= limit
    assert [event.step for event in heard if isinstance(event, Metrics) and event.train_loss] == [1, 2, 3, 4]
    assert cut.resources["oom_retries"] == len(facts)
    assert close(adapter(cut), adapter(plain))


def test_memory_that_stays_away_in_the_middle_ends_the_run(wanted, tmp_path, monkeypatch):
    memory, heard = Memory(monkeypatch), []
    with pytest.raises(OutOfMemory):
        run(wanted(), tmp_path / "out", after(2, memory, heard, limit=4))
    assert 1 <= len(told(heard)) <= 3, "passes of single rows are not halved"


@pytest.mark.parametrize("members", [1, 2])
def test_memory_that_runs_out_in_a_short_step_leaves_passes_of_half_of_what_rows_make(
    wanted, tmp_path, monkeypatch, members
):
    """The last step of an epoch has a row or two: half of those would be tiny passes for the rest of the run."""
    memory, heard = Memory(monkeypatch), [[] for _ in range(members)]
    training = {"batch_size": 11, "max_steps": 4}  # of 12 rows
    specs = [wanted(training=training, micro_batch_size=8, seed=seed) for seed in range(members)]

    def listener(who):
        def hear(event):
            heard[who].append(event)
            once = isinstance(event, Metrics) and event.step == 1 and who == members - 1
            memory.limit = 4 if once else memory.limit

        return hear

    allocate = memory.allocate

    def fail_once(model, **named):
        try:
            allocate(model, **named)
        finally:
            memory.limit = 10_000

    memory.allocate = fail_once
    ends = dict(run_together([Request(s, tmp_path / f"{n}", listener(n)) for n, s in enumerate(specs)]))
    for who, end in ends.items():
        (fact,) = told(heard[who])
        assert end.resources[TOKENS] == fact[TOKENS] > 60


def test_evidence_that_does_not_fit_is_collected_in_smaller_passes(wanted, tmp_path, monkeypatch):
    training, heard = {"batch_size": 4}, []
    init = {"method": "lora_ga", "samples": 4}
    plain = run(wanted(lora={"init": init}, training=training), tmp_path / "plain", lambda event: None)
    memory = Memory(monkeypatch, tokens=60)
    memory.train = memory.allocate  # its passes carry no adapter
    cut = run(wanted(lora={"init": init}, training=training), tmp_path / "cut", heard.append)
    assert "evidence" in next(e.message for e in heard if isinstance(e, Message) and e.data["kind"] == "oom_retry")
    assert close(adapter(cut), adapter(plain), atol=1e-4)


# --- evaluations ----------------------------------------------------------------------------------


def evaluated(heard):
    return [event.full_valid_loss for event in heard if isinstance(event, Metrics) and event.full_valid_loss]


@pytest.mark.parametrize("limit", [100, 50])
def test_an_evaluation_that_runs_out_of_memory_is_done_again_and_gives_the_same_number(
    wanted, rows, tmp_path, monkeypatch, limit
):
    """Training, which fitted, keeps its passes, and so its bits."""
    one = wanted(data={"validation": str(rows)}, training={"batch_size": 4, "eval_interval": 2}, micro_batch_size=8)
    straight, heard = [], []
    plain = run(one, tmp_path / "plain", straight.append)
    memory = Memory(monkeypatch)
    cut = run(one, tmp_path / "cut", until_export(memory, after(1, memory, heard, looking=limit)))
    facts = told(heard)
    assert {fact["stage"] for fact in facts} == {"evaluating"}
    assert limit // 2 < facts[-1][TOKENS] <= limit
    assert evaluated(heard) == pytest.approx(evaluated(straight), rel=1e-5)
    assert len(evaluated(heard)) == 3
    assert all(torch.equal(tensor, adapter(plain)[name]) for name, tensor in adapter(cut).items())
    assert (cut.resources["oom_retries"], cut.resources[TOKENS]) == (len(facts), plain.resources[TOKENS])


def test_an_evaluation_that_never_fits_is_out_of_memory(wanted, rows, tmp_path, monkeypatch):
    memory, heard = Memory(monkeypatch), []
    one = wanted(data={"validation": str(rows)}, training={"batch_size": 4, "eval_interval": 2}, micro_batch_size=8)
    with pytest.raises(OutOfMemory):
        run(one, tmp_path / "out", after(1, memory, heard, looking=4))
    assert 1 <= len(told(heard)) <= 4, "passes of single rows are not halved"


def test_of_a_group_one_whose_evaluation_does_not_fit_has_smaller_ones_alone(wanted, rows, tmp_path, monkeypatch):
    memory, heard = Memory(monkeypatch), [[], []]
    more = ({"data": {"validation": str(rows)}}, {})
    specs = [wanted(seed=n, micro_batch_size=8, **some) for n, some in enumerate(more)]
    first = until_export(memory, after(1, memory, heard[0], looking=100))
    requests = [Request(specs[0], tmp_path / "0", first), Request(specs[1], tmp_path / "1", heard[1].append)]
    ends = dict(run_together(requests))
    assert all(isinstance(end, Done) for end in ends.values())
    assert told(heard[0])
    assert not told(heard[1])


# --- checkpoints ----------------------------------------------------------------------------------


def short_of_memory(monkeypatch, times):
    """Writing a checkpoint runs out of memory so many times."""
    write, left = course.write, iter(range(times))

    def short(*args, **named):
        if next(left, None) is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        write(*args, **named)

    monkeypatch.setattr(course, "write", short)


def test_a_checkpoint_that_runs_out_of_memory_is_written_again(wanted, tmp_path, monkeypatch):
    short_of_memory(monkeypatch, 1)
    heard = []
    run(wanted(), tmp_path / "out", heard.append)
    assert [event.step for event in heard if isinstance(event, Checkpoint)] == [2, 4]


def test_a_checkpoint_that_runs_out_of_memory_twice_is_out_of_memory(wanted, tmp_path, monkeypatch):
    short_of_memory(monkeypatch, 2)
    with pytest.raises(OutOfMemory):
        run(wanted(), tmp_path / "out", lambda event: None)


# --- several processes ----------------------------------------------------------------------------


def test_where_one_of_two_processes_runs_out_of_memory_both_do_the_step_again(wanted, rows, tmp_path):
    one = wanted(data={"validation": str(rows)}, training={"batch_size": 11, "eval_interval": 2}, micro_batch_size=3)
    alone = run(one, tmp_path / "alone", lambda event: None)
    (tmp_path / "spec.json").write_text(one.model_copy(update={"devices": 2}).model_dump_json())
    run_ranks("tests.lorainit.short_rank", 2, tmp_path)
    assert close(load_file(tmp_path / "shared/adapter/adapter_model.safetensors"), adapter(alone))
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert said[0] == said[1]
    assert {fact.get("stage") for fact in said[0]} == {None, "evaluating"}
