"""Before the first step: what does not fit into memory is found out and made to fit, and slow parts are compiled."""

import errno
import json
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import DistBackendError
from transformers import AttentionInterface

from lorainit import base as base_module
from lorainit import compiled, fit
from lorainit.batches import Budget
from lorainit.data import Sample
from lorainit.errors import OutOfMemory
from lorainit.events import Checkpoint, Message, Metrics, Plan
from lorainit.group import GroupedLinear
from lorainit.hardware import is_out_of_memory
from lorainit.largest import Rows
from lorainit.layer import LoRALinear
from lorainit.model import attention
from lorainit.recompute import layers_of, recompute
from lorainit.run import Request, run, run_together
from tests.lorainit.conftest import chat, tiny_llama, write_rows

CHECKPOINTING, TOKENS = "gradient_checkpointing", "tokens_per_pass"


class Memory:
    """A base whose training passes run out of memory beyond `tokens`, unless layers are computed again."""

    def __init__(self, monkeypatch, *, tokens, recomputed=None):
        self.limit, self.recomputed, self.largest = tokens, recomputed, 0
        load_model = base_module.load_model

        def small(*args, **named):
            model = load_model(*args, **named)
            model.register_forward_pre_hook(lambda _, __, named: self.train(model, **named), with_kwargs=True)
            return model

        monkeypatch.setattr(base_module, "load_model", small)

    def train(self, model, **named):
        """What runs without an adapter is no training."""
        if any(isinstance(module, LoRALinear | GroupedLinear) for module in model.modules()):
            self.allocate(model, **named)

    def allocate(self, model, *, input_ids, **_named):
        if not torch.is_grad_enabled():
            return
        again = any("forward" in vars(layer) for layer in layers_of(model))
        if input_ids.numel() > (self.recomputed if again and self.recomputed else self.limit):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.largest = max(self.largest, input_ids.numel())


def told(events):
    kinds = ("oom_retry", "machine")
    return [e.data for e in events if isinstance(e, Message) and e.data["kind"] in kinds and "rows" not in e.data]


def adapter(done):
    return load_file(f"{done.adapter}/adapter_model.safetensors")


def close(one, two, *, atol=2e-6):
    return one.keys() == two.keys() and all(torch.allclose(one[n], two[n], atol=atol, rtol=1e-4) for n in one)


@pytest.fixture
def wanted(spec):
    return lambda **more: spec("wide-llama", **{"micro_batch_size": 4, "training": {"batch_size": 4}, **more})


@pytest.fixture
def model():
    return tiny_llama(64, 128).requires_grad_(False)


def test_a_batch_that_does_not_fit_is_cut_and_the_step_stays_what_it_was(wanted, tmp_path, monkeypatch):
    plain = run(wanted(), tmp_path / "plain", lambda event: None)
    memory, heard = Memory(monkeypatch, tokens=70), []
    cut = run(wanted(), tmp_path / "cut", heard.append)
    (fact,) = told(heard)
    assert fact["kind"] == "oom_retry"
    assert 30 < memory.largest <= fact[TOKENS] <= 70
    plans = [event.tokens_per_pass for event in heard if isinstance(event, Plan)]
    assert plans == [2048, fact[TOKENS]], "what will run is told again"
    assert (cut.resources["oom_retries"], cut.resources[TOKENS]) == (1, fact[TOKENS])
    assert plain.resources["gradient_accumulation_steps"] == 1 < cut.resources["gradient_accumulation_steps"] <= 4
    manifest = json.loads((Path(cut.adapter) / "manifest.json").read_text())
    assert manifest["plan"][TOKENS] == fact[TOKENS]
    assert close(adapter(cut), adapter(plain))


@pytest.mark.parametrize("length", [5, 700, 1023, 1025, 5000])
@pytest.mark.parametrize("members", [1, 3])
def test_of_two_passes_that_are_measured_one_has_about_twice_the_tokens(length, members):
    """Else the difference between them would be the allocator's rounding and not what tokens take."""
    row = Sample(1, list(range(length)), torch.ones(length, dtype=torch.bool))
    member = SimpleNamespace(data=SimpleNamespace(samples=[row]))
    small, large = (
        sum(len(s.ids) for s in fit._like_the_longest(member, tokens // members, fit.PROBED // 2 // members))
        for tokens in (fit.PROBED // 2, fit.PROBED)
    )
    assert 1.8 * small <= large <= 3 * small <= 3 * fit.PROBED // 2


def after(step, memory, heard, *, limit):
    """A listener that makes memory short after a step."""

    def shrink(event):
        heard.append(event)
        if isinstance(event, Metrics) and event.step == step:
            memory.limit = limit

    return shrink


@pytest.mark.parametrize("limit", [80, 40])
def test_memory_that_runs_out_in_the_middle_halves_passes_and_the_step_is_done_again(
    wanted, tmp_path, monkeypatch, limit
):
    plain = run(wanted(), tmp_path / "plain", lambda event: None)
    memory, heard = Memory(monkeypatch, tokens=10_000), []
    cut = run(wanted(), tmp_path / "cut", after(2, memory, heard, limit=limit))
    facts = told(heard)
    assert limit // 2 < facts[-1][TOKENS] <= limit
    assert [event.step for event in heard if isinstance(event, Metrics) and event.train_loss] == [1, 2, 3, 4]
    assert cut.resources["oom_retries"] == len(facts)
    assert close(adapter(cut), adapter(plain))


def test_memory_that_stays_away_in_the_middle_ends_the_run(wanted, tmp_path, monkeypatch):
    memory, heard = Memory(monkeypatch, tokens=10_000), []
    with pytest.raises(OutOfMemory):
        run(wanted(), tmp_path / "out", after(2, memory, heard, limit=4))
    assert 1 <= len(told(heard)) <= 3, "passes of single rows are not halved"


@pytest.mark.parametrize("members", [1, 2])
def test_memory_that_runs_out_in_a_short_step_leaves_passes_of_half_of_what_rows_make(
    wanted, tmp_path, monkeypatch, members
):
    """The last step of an epoch has a row or two: half of those would be tiny passes for the rest of the run."""
    memory, heard = Memory(monkeypatch, tokens=10_000), [[] for _ in range(members)]
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


def test_validation_that_does_not_fit_is_cut_before_the_first_step(wanted, tmp_path, monkeypatch):
    """Its rows may be longer than those of training, and it was not tried once: what it takes came as a surprise."""
    rows = write_rows(tmp_path / "valid.jsonl", [chat(f"q{i}", "one two three " * 8) for i in range(5)])
    plain = run(wanted(data={"validation": str(rows)}), tmp_path / "plain", lambda event: None)
    memory, heard = Memory(monkeypatch, tokens=10_000), []

    def allocate(model, *, input_ids, **_named):
        if not torch.is_grad_enabled() and input_ids.numel() > 200:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    memory.allocate = allocate
    cut = run(wanted(data={"validation": str(rows)}), tmp_path / "cut", heard.append)
    (fact,) = told(heard)
    first = next(n for n, event in enumerate(heard) if isinstance(event, Metrics))
    assert fact[TOKENS] <= 200
    assert [e.data for e in heard[:first] if isinstance(e, Message)][-1] == fact
    assert close(adapter(cut), adapter(plain))


def test_validation_rows_like_those_of_training_are_not_tried_beside_them():
    def member(*lengths):
        samples = [[Sample(1, torch.arange(n), torch.ones(n, dtype=torch.bool)) for n in some] for some in lengths]
        data, valid = (SimpleNamespace(samples=some) for some in samples)
        budget = Budget(2, 100, packed=True)
        largest = Rows(data.samples, 2).largest_pass(budget)
        return SimpleNamespace(data=data, valid=valid, budget=budget, largest_pass=lambda: largest)

    for lengths, tried in (([[20, 30, 40], [30, 30]], 1), ([[20, 30, 40], [60]], 2), ([[20, 30, 40], [35, 36]], 2)):
        assert len(list(fit._trials([member(*lengths)]))) == tried


def test_a_run_that_goes_on_keeps_its_passes_and_gives_the_same_bits(wanted, tmp_path, monkeypatch):
    training = {"batch_size": 4, "checkpoint_interval": 2}
    memory, heard = Memory(monkeypatch, tokens=70), []
    whole = run(wanted(training=training), tmp_path / "whole", heard.append)
    point = next(event for event in heard if isinstance(event, Checkpoint))
    memory.limit = 10_000
    rest = run(wanted(training=training, resume_from=point.path), tmp_path / "rest", lambda event: None)
    assert rest.resources[TOKENS] == whole.resources[TOKENS] <= 70
    assert all(torch.equal(tensor, adapter(whole)[name]) for name, tensor in adapter(rest).items())


def test_a_run_that_goes_on_computes_layers_again_if_it_had_to(wanted, tmp_path, monkeypatch):
    training = {"batch_size": 4, "checkpoint_interval": 2}
    Memory(monkeypatch, tokens=4, recomputed=70)
    lora, heard = {"init": "kaiming", "dropout": 0.2}, []
    whole = run(wanted(training=training, lora=lora), tmp_path / "whole", lambda event: None)
    point = tmp_path / "whole/checkpoints/step-000002"
    rest = run(wanted(training=training, lora=lora, resume_from=str(point)), tmp_path / "rest", heard.append)
    assert told(heard) == [{"kind": "machine", CHECKPOINTING: True}]
    assert rest.resources[TOKENS] == whole.resources[TOKENS]
    assert all(torch.equal(tensor, adapter(whole)[name]) for name, tensor in adapter(rest).items())


def test_evidence_that_does_not_fit_is_collected_in_smaller_passes(wanted, tmp_path, monkeypatch):
    training, heard = {"batch_size": 4}, []
    init = {"method": "lora_ga", "samples": 4}
    plain = run(wanted(lora={"init": init}, training=training), tmp_path / "plain", lambda event: None)
    memory = Memory(monkeypatch, tokens=60)
    memory.train = memory.allocate  # its passes carry no adapter
    cut = run(wanted(lora={"init": init}, training=training), tmp_path / "cut", heard.append)
    assert "evidence" in next(e.message for e in heard if isinstance(e, Message) and e.data["kind"] == "oom_retry")
    assert close(adapter(cut), adapter(plain), atol=1e-4)


def test_gradient_checkpointing_is_the_last_resort(wanted, tmp_path, monkeypatch):
    plain = run(wanted(micro_batch_size=1), tmp_path / "plain", lambda event: None)
    Memory(monkeypatch, tokens=4, recomputed=70)
    heard = []
    done = run(wanted(), tmp_path / "again", heard.append)
    *smaller, none = [fact.get(TOKENS) for fact in told(heard)]
    assert smaller == sorted(smaller, reverse=True)
    assert len(smaller) >= 2
    assert none is None
    assert told(heard)[-1] == {"kind": "oom_retry", CHECKPOINTING: True}
    ours, theirs = adapter(done), adapter(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("switch", [False, "auto"])
def test_what_cannot_fit_is_out_of_memory_with_advice(wanted, tmp_path, monkeypatch, switch):
    Memory(monkeypatch, tokens=4, recomputed=70 if switch is False else 4)
    heard = []
    with pytest.raises(OutOfMemory, match="max_length") as error:
        run(wanted(training={CHECKPOINTING: switch, "batch_size": 4}), tmp_path / "out", heard.append)
    assert error.value.param == "training.max_length"
    assert not [event for event in heard if isinstance(event, Metrics) and event.train_loss]


def test_the_trial_leaves_room_for_what_the_optimizer_will_hold(wanted, tmp_path, monkeypatch):
    """AdamW's moments come with the first step, twice what is trained: a trial without them fits where no step does."""
    held, seen, make = weakref.WeakSet(), [], torch.empty_like

    def noted(tensor, **how):
        held.add(made := make(tensor, **how))
        return made

    memory = Memory(monkeypatch, tokens=10_000)
    memory.allocate = lambda *_, **__: seen.append(sum(t.numel() for t in held)) if torch.is_grad_enabled() else None
    monkeypatch.setattr(fit.torch, "empty_like", noted)
    heard = []
    run(wanted(lora={"init": "kaiming"}), tmp_path / "out", heard.append)
    plan = next(event for event in heard if isinstance(event, Plan))
    assert seen[0] >= 2 * plan.trainable_parameters


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (RuntimeError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
        (RuntimeError, "CUDA error: out of memory"),
        (RuntimeError, "CUDA driver error: out of memory"),
        (RuntimeError, "Triton Error [CUDA]: out of memory"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        (RuntimeError, "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        (RuntimeError, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        (DistBackendError, "NCCL error ... ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
         "Cuda failure 2 'out of memory'"),
        (DistBackendError, "NCCL error ... Last error:\nFailed to CUDA calloc 10485760 bytes"),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        (DistBackendError, "NCCL error ... Last error:\nFailed to CUDA malloc 10485760 bytes"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtCreate(&handle)`"),
        (RuntimeError, "cusolver error: CUSOLVER_STATUS_NOT_INITIALIZED, when calling `cusolverDnCreate(handle)`"),
        (RuntimeError, "unable to mmap 5000 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
        (partial(OSError, errno.ENOMEM), "Cannot allocate memory"),
        (MemoryError, ""),
    ],
)  # fmt: skip
def test_memory_that_ran_out_is_known_in_every_librarys_words(kind, text):
    assert is_out_of_memory(kind(text))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle)`"),
        RuntimeError("out of resource: shared memory, Required: 264192, Hardware limit: 232448"),
        ValueError("the text of a row says: out of memory"),
    ],
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)


def test_any_other_failure_of_the_trial_is_itself(wanted, tmp_path, monkeypatch):
    memory = Memory(monkeypatch, tokens=70)
    # The proof before it makes no gradients.
    memory.allocate = lambda *_, **__: torch.is_grad_enabled() and torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="inconsistent tensor"):
        run(wanted(), tmp_path / "out", lambda event: None)


def test_members_of_a_group_get_smaller_together(wanted, tmp_path, monkeypatch):
    specs = [wanted(seed=seed) for seed in (1, 2)]
    plain = [adapter(run(one, tmp_path / f"{i}", lambda event: None)) for i, one in enumerate(specs)]
    Memory(monkeypatch, tokens=160)
    heard = [[], []]
    requests = [Request(one, tmp_path / f"g{i}", heard[i].append) for i, one in enumerate(specs)]
    ends = dict(run_together(requests))
    for i in (0, 1):
        assert told(heard[i])[-1][TOKENS] <= 80
        assert close(adapter(ends[i]), plain[i])


@pytest.mark.parametrize("name", ["wide-llama", "wide-gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_computed_again_give_the_same_bits(spec, tmp_path, name, dropout):
    ends = []
    for switch in (False, True):
        one = spec(name, lora={"init": "kaiming", "dropout": dropout}, training={CHECKPOINTING: switch})
        ends.append(adapter(run(one, tmp_path / str(switch), lambda event: None)))
    assert all(torch.equal(ends[0][tensor], ends[1][tensor]) for tensor in ends[0])


def test_layers_computed_again_keep_less(model):
    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(inputs_embeds=embedded, use_cache=False)
        return sum(sizes)

    embedded = torch.randn(2, 32, model.config.hidden_size, requires_grad=True)
    before = kept()
    assert recompute(model)
    assert recompute(model), "switching it on again changes nothing"
    assert kept() < before / 3


# --- compilation --------------------------------------------------------------------------------


@pytest.fixture
def afterwards(monkeypatch):
    """What is kept out of compilation is as it was, once the test is over."""
    for kind in (LoRALinear, GroupedLinear):
        monkeypatch.setattr(kind, "forward", kind.forward)
    yield
    AttentionInterface.register(attention.NAME, attention.attend)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
@pytest.mark.usefixtures("afterwards")
def test_a_run_whose_compilation_fails_goes_on_and_says_so(wanted, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("no compiler here\nand a long story")

    compile_layers = compiled.compile_layers

    def with_a_broken_backend(model):
        compile_layers(model)
        for layer in layers_of(model):
            layer.compile(backend=broken)

    plain = run(wanted(), tmp_path / "plain", lambda event: None)
    monkeypatch.setattr(compiled, "compile_layers", with_a_broken_backend)
    heard = []
    done = run(wanted(training={"compile": True, "batch_size": 4}), tmp_path / "out", heard.append)
    (warning,) = [event for event in heard if isinstance(event, Message) and event.data.get("compiled") is False]
    assert warning.level == "warn"
    assert "no compiler here" in warning.message
    assert "\n" not in warning.message
    assert all(torch.equal(tensor, adapter(plain)[name]) for name, tensor in adapter(done).items())


def test_when_compiling_pays(model, monkeypatch):
    monkeypatch.setattr(compiled, "PAYS_FROM", 1e6)
    assert not compiled.pays(model, tokens=10**9)[0], "float32"
    model.to(torch.bfloat16)
    assert compiled.pays(model, tokens=10**9)[0]
    assert "too short" in compiled.pays(model, tokens=1)[1]
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "none")
    assert "compiler" in compiled.pays(model, tokens=10**9)[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
@pytest.mark.usefixtures("afterwards")
def test_compiled_layers_train_what_plain_ones_train(wanted, tmp_path):
    plain = run(wanted(), tmp_path / "plain", lambda event: None)
    heard = []
    done = run(wanted(training={"compile": True, "batch_size": 4}), tmp_path / "compiled", heard.append)
    assert told(heard)[-1]["compiled"] is True
    assert close(adapter(done), adapter(plain), atol=1e-5)
