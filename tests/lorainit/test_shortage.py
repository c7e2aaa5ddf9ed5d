"""Memory that runs out in mid-run: the work is done again in smaller passes, or ends with its own code."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lorainit.config.errors import OutOfMemory, UpdateOutOfMemory
from lorainit.config.events import Checkpoint, Done, Message, Metrics
from lorainit.context import RunRequest
from lorainit.init.collectors import inputs, moments
from lorainit.run import run, run_together
from lorainit.train import adapter_trainer
from tests.lorainit.conftest import only_training
from tests.lorainit.ranks import run_ranks
from tests.lorainit.shortage import TOKENS, Memory, adapter, after, close, told, until_export

pytestmark = pytest.mark.usefixtures("training_only")


@pytest.fixture(scope="module")
def plainly(tmp_path_factory):
    """How a run ends whose memory suffices, and its events; each is run once."""
    ended = {}

    def end_of(spec):
        key = spec.model_dump_json()
        if key not in ended:
            heard = []
            with only_training():
                ended[key] = run(spec, tmp_path_factory.mktemp("plain"), heard.append), heard
        return ended[key]

    return end_of


@pytest.mark.parametrize("limit", [pytest.param(80, marks=pytest.mark.slow), 40])
def test_memory_that_runs_out_in_the_middle_halves_passes_and_the_step_is_done_again(
    wanted, plainly, tmp_path, monkeypatch, limit
):
    plain, _ = plainly(wanted())
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


@pytest.mark.parametrize("members", [pytest.param(1, marks=pytest.mark.slow), 2])
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
    ends = dict(run_together([RunRequest(s, tmp_path / f"{n}", listener(n)) for n, s in enumerate(specs)]))
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


def test_evidence_of_few_short_rows_is_halved_by_what_they_make_and_counted(wanted, tmp_path, monkeypatch):
    """Half of a budget of 2,048 tokens would change no pass."""
    init, heard = {"method": "corda", "samples": 4}, []
    memory = Memory(monkeypatch)
    largest = []
    memory.train = lambda model, *, input_ids, **_named: largest.append(input_ids.numel())
    look = inputs.collect_inputs

    def look_once(*args, **named):
        monkeypatch.setattr(moments, "collect_inputs", look)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(moments, "collect_inputs", look_once)
    cut = run(wanted(lora={"init": init}), tmp_path / "cut", heard.append)
    (fact,) = [fact for fact in told(heard) if TOKENS in fact]
    assert fact[TOKENS] <= max(largest) // 2
    assert cut.resources["oom_retries"] == 1


# --- the end of a step ----------------------------------------------------------------------------


def once(monkeypatch, owner, name, *, step, times=1):
    """The method of a trainer runs out of memory so many times, at this step of the first one that takes it."""
    plain, left = getattr(owner, name), iter(range(times))

    def short(self, *args, **named):
        found = plain(self, *args, **named) if name == "_sums" else None
        if self.step == step and next(left, None) is not None:  # at its end, when gradients are clipped
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return found if name == "_sums" else plain(self, *args, **named)

    monkeypatch.setattr(owner, name, short)


DROPS = {"lora": {"init": "kaiming", "r": 2, "dropout": 0.2}}


def test_sums_that_run_out_of_memory_are_made_of_the_same_step_again_with_the_same_bits(
    wanted, plainly, tmp_path, monkeypatch
):
    plain, _ = plainly(wanted(**DROPS))
    once(monkeypatch, adapter_trainer.AdapterTrainer, "_sums", step=2)
    heard = []
    cut = run(wanted(**DROPS), tmp_path / "cut", heard.append)
    assert all(torch.equal(tensor, adapter(plain)[name]) for name, tensor in adapter(cut).items())
    assert (cut.resources["oom_retries"], cut.resources[TOKENS]) == (1, plain.resources[TOKENS])
    assert [fact["kind"] for fact in told(heard)] == ["oom_retry"]
    assert [event.step for event in heard if isinstance(event, Metrics) and event.train_loss] == [1, 2, 3, 4]


def test_of_a_group_one_whose_sums_run_out_of_memory_does_its_own_step_again(wanted, plainly, tmp_path, monkeypatch):
    specs, heard = [wanted(**DROPS), wanted(seed=2, **DROPS)], [[], []]
    plain = [plainly(one)[0] for one in specs]
    once(monkeypatch, adapter_trainer.AdapterTrainer, "_sums", step=2)
    requests = [RunRequest(s, tmp_path / f"{n}", heard[n].append) for n, s in enumerate(specs)]
    cut = dict(run_together(requests))
    assert all(close(adapter(cut[who]), adapter(plain[who])) for who in (0, 1))
    assert [len(told(events)) for events in heard] == [1, 0]


def test_sums_that_run_out_of_memory_twice_are_out_of_memory(wanted, tmp_path, monkeypatch):
    once(monkeypatch, adapter_trainer.AdapterTrainer, "_sums", step=2, times=2)
    with pytest.raises(OutOfMemory):
        run(wanted(), tmp_path / "out", lambda event: None)


@pytest.mark.parametrize("members", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_update_that_runs_out_of_memory_says_so_and_that_it_may_pass(wanted, tmp_path, monkeypatch, members):
    class Short:
        def __init__(self, optimizer):
            self.optimizer, self.steps = optimizer, 0

        def __getattr__(self, name):
            return getattr(self.optimizer, name)

        def step(self):
            self.steps += 1
            if self.steps == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            self.optimizer.step()

    make, made = adapter_trainer.make_optimizer, []

    def make_first_short(*args):
        made.append(make(*args))
        return Short(made[0]) if len(made) == 1 else made[-1]

    monkeypatch.setattr(adapter_trainer, "make_optimizer", make_first_short)
    specs = [wanted(seed=seed) for seed in range(members)]
    ends = {}
    requests = [RunRequest(s, tmp_path / f"{n}", lambda event: None) for n, s in enumerate(specs)]
    ends = dict(run_together(requests))
    assert isinstance(ends[0], UpdateOutOfMemory)
    assert (ends[0].code, ends[0].may_pass) == ("out_of_memory", True)
    assert "update of step 3" in ends[0].message
    assert all(isinstance(ends[who], Done) for who in range(1, members))


# --- evaluations ----------------------------------------------------------------------------------


def evaluated(heard):
    return [event.full_valid_loss for event in heard if isinstance(event, Metrics) and event.full_valid_loss]


@pytest.mark.parametrize("limit", [pytest.param(100, marks=pytest.mark.slow), 50])
def test_an_evaluation_that_runs_out_of_memory_is_done_again_and_gives_the_same_number(
    wanted, rows, plainly, tmp_path, monkeypatch, limit
):
    """Training, which fitted, keeps its passes, and so its bits."""
    one = wanted(data={"validation": str(rows)}, training={"batch_size": 4, "eval_interval": 2}, micro_batch_size=8)
    plain, straight = plainly(one)
    memory, heard = Memory(monkeypatch), []
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
    requests = [RunRequest(specs[0], tmp_path / "0", first), RunRequest(specs[1], tmp_path / "1", heard[1].append)]
    ends = dict(run_together(requests))
    assert all(isinstance(end, Done) for end in ends.values())
    assert told(heard[0])
    assert not told(heard[1])


# --- checkpoints ----------------------------------------------------------------------------------


def short_of_memory(monkeypatch, times):
    """Writing a checkpoint runs out of memory so many times."""
    write, left = adapter_trainer.write, iter(range(times))

    def short(*args, **named):
        if next(left, None) is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        write(*args, **named)

    monkeypatch.setattr(adapter_trainer, "write", short)


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


@pytest.mark.parametrize(
    ("method", "who", "call"),
    [
        ("eva", 1, 5),
        ("lora_ga", 1, 1),
        ("hrp", 0, 2),
        *(pytest.param("eva", who, call, marks=pytest.mark.slow) for who, call in ((1, 1), (0, 3))),
    ],
)
def test_evidence_for_which_one_of_two_processes_lacks_memory_is_collected_again_by_both(
    wanted, tmp_path, method, who, call
):
    """They talk to each other in the middle: what is free, and whether directions stand still."""
    one = wanted(lora={"init": method, "r": 2}, training={"batch_size": 4, "max_steps": 2}, devices=2)
    (tmp_path / "spec.json").write_text(one.model_dump_json())
    (tmp_path / "short.json").write_text(json.dumps({"method": method, "rank": who, "call": call}))
    run_ranks("tests.lorainit.short_evidence_rank", 2, tmp_path)
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert said[0] == said[1]
    assert [fact["kind"] for fact in said[0]] == ["oom_retry"]
