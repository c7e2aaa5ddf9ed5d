"""What earlier runs found out: who pays, who does not, and what happens when the disk misbehaves."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from lorainit.config.events import Message
from lorainit.config.inits import INITS
from lorainit.init import stage
from lorainit.model.layout import choose_layout
from lorainit.runtime import disk_cache as store_module
from tests.lorainit.contexts import prepared


@pytest.fixture
def counted(monkeypatch):
    """The methods whose evidence was collected, in order."""
    calls, collect = [], stage.collect

    def count(config, context):
        if config.facts.needs not in ("none", "weight"):
            calls.append(config.method)
        return collect(config, context)

    monkeypatch.setattr(stage, "collect", count)
    return calls


@pytest.fixture
def begin(spec, tmp_path):
    """Initialize a run and go no further: its summary, factors and events."""

    def start(init, *, cache=tmp_path / "cache", **overrides):
        events = []
        made = spec(lora={"init": init}, cache=str(cache) if cache else None, **overrides)
        job = prepared(made, tmp_path / "out", events.append)
        report = stage.start(job)
        start.modules = report.modules  # type: ignore[attr-defined]
        factors = {n: (m.A.detach().clone(), m.B.detach().clone()) for n, m in job.layers.items()}
        return report.summary, factors, [e.message for e in events if isinstance(e, Message) and e.level == "warn"]

    return start


def same(one, two):
    return all(torch.equal(a, b) for n in one for a, b in zip(one[n], two[n], strict=True))


GRADIENT = {"method": "lora_ga", "samples": 4}


SEEDLESS = {
    "lora_ga": GRADIENT,
    "lora_one": {"method": "lora_one", "samples": 4},
    "lora_one auto": {"method": "lora_one", "samples": 4, "gamma": "auto"},
    "corda": {"method": "corda", "samples": 4},
    "eva": {"method": "eva", "samples": 4},
}


@pytest.mark.parametrize("init", SEEDLESS.values(), ids=SEEDLESS)
def test_second_seed_pays_nothing_for_evidence_that_no_seed_shapes(begin, counted, init):
    first, before, _ = begin(init)
    second, found, _ = begin(init, seed=1)
    assert same(before, found)
    assert counted == [init["method"]]
    assert (first["cached"], second["cached"]) == (False, True)
    assert first["samples"] == second["samples"] == 4
    _, fresh, _ = begin(init, seed=1, cache=None)
    assert same(found, fresh)


def test_evidence_that_a_seed_shapes_is_collected_for_each(begin, counted):
    init = {"method": "hrp", "preheat_rank": 8, "preheat_steps": 2}
    begin(init)
    assert begin(init, seed=1)[0]["cached"] is False
    assert begin(init)[0]["cached"] is True
    assert len(counted) == 2


@pytest.mark.parametrize(
    "change",
    [{"lora": {"r": 2}}, {"lora": {"target_modules": ["q_proj"]}}, {"training": {"precision": "bf16"}},
     {"training": {"max_length": 24}}],
    ids=["rank", "targets", "precision", "rows"],
)  # fmt: skip
def test_whatever_shapes_the_evidence_is_in_its_name(begin, counted, spec, tmp_path, change):
    begin(GRADIENT)
    lora = change.pop("lora", {})
    events = []
    made = spec(lora={"init": GRADIENT, **lora}, cache=str(tmp_path / "cache"), **change)
    report = stage.start(prepared(made, tmp_path / "out", events.append))
    assert report.summary["cached"] is False
    assert len(counted) == 2


def test_parameters_of_the_method_are_in_the_name(begin, counted):
    begin(GRADIENT)
    assert begin({**GRADIENT, "gamma": 8.0})[0]["cached"] is False


def test_other_code_is_a_miss(begin, counted, monkeypatch):
    begin(GRADIENT)
    monkeypatch.setattr(store_module, "code_version", lambda: "next release")
    assert begin(GRADIENT)[0]["cached"] is False


def test_starts_that_took_long_are_kept_and_are_the_same_bits(begin, monkeypatch):
    monkeypatch.setattr(stage, "WORTH_KEEPING_SECONDS", 0.0)
    exact = {"method": "pissa", "niter": None}
    first, one, _ = begin(exact)
    modules = begin.modules
    second, two, _ = begin(exact, seed=5)  # the full SVD draws nothing
    assert (first["cached"], second["cached"]) == (False, True)
    assert same(one, two)
    assert begin.modules == modules
    assert second["captured_energy"] == first["captured_energy"]


def test_a_start_that_draws_is_kept_for_its_seed_alone(begin, counted, monkeypatch):
    monkeypatch.setattr(stage, "WORTH_KEEPING_SECONDS", 0.0)
    init = GRADIENT | {"direction": "random"}
    begin(init)
    entries = begin.modules
    assert begin(init)[0]["gradient_alignment"] is not None
    assert begin.modules == entries
    _, one, _ = begin(init)
    _, two, _ = begin(init, seed=1)
    assert not same(one, two)
    assert counted == ["lora_ga"]


def test_dora_shares_the_evidence_but_not_the_starts(begin, counted, spec, tmp_path, monkeypatch):
    """The gradients are those of the base model; the report of a start has the magnitudes in it."""
    monkeypatch.setattr(stage, "WORTH_KEEPING_SECONDS", 0.0)
    init = {"method": "lora_one", "samples": 4}
    begin(init)
    assert not any("magnitude_norm" in facts for facts in begin.modules)
    made = spec(lora={"init": init, "use_dora": True}, cache=str(tmp_path / "cache"))
    found = []
    for _ in range(2):
        job = prepared(made, tmp_path / "out")
        found.append(stage.start(job).modules)
        found.append([layer.magnitude.tolist() for layer in job.layers.values()])
    assert counted == ["lora_one"]
    assert all(facts["magnitude_norm"] > 0 for facts in found[0])
    assert found[2:] == found[:2]


def test_quick_starts_are_not_kept(begin, tmp_path):
    begin("loram")
    assert not (tmp_path / "cache" / "init").exists()


def test_without_a_folder_or_a_limit_nothing_is_kept(begin, counted, tmp_path):
    for _ in range(2):
        begin(GRADIENT, cache=None)
        begin(GRADIENT, cache_limit_bytes=0)
    assert len(counted) == 4
    assert not list(tmp_path.rglob("init"))


def flip(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


SPOILED = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "another format": lambda path: path.write_bytes(b"not safetensors at all" * 9),
    "one bit": flip,
}


@pytest.mark.parametrize(
    "how", ["empty", "one bit", *(pytest.param(how, marks=pytest.mark.slow) for how in ("cut", "another format"))]
)
def test_a_corrupt_entry_is_a_miss_with_a_warning_and_is_replaced(begin, counted, tmp_path, how):
    _, one, _ = begin(GRADIENT)
    (path,) = (tmp_path / "cache" / "init").iterdir()
    SPOILED[how](path)
    summary, two, warnings = begin(GRADIENT)
    assert summary["cached"] is False
    assert any("cannot be read" in text for text in warnings)
    assert same(one, two)
    assert begin(GRADIENT)[0]["cached"] is True
    assert len(counted) == 2


def test_a_full_disk_costs_a_warning_and_not_the_run(begin, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "save_file", fail)
    summary, _, warnings = begin(GRADIENT)
    assert summary["cached"] is False
    assert any("could not be cached" in text for text in warnings)


# --- what each part is worth ---------------------------------------------------------------------


@pytest.mark.parametrize("init", SEEDLESS.values(), ids=SEEDLESS)
def test_second_seed_costs_no_pass_over_the_calibration_rows(begin, monkeypatch, init):
    """Only what every run measures is left: loss and logits of the probe with the adapter off and on, in one pass
    each, and a displaced start's loss."""
    passes = []
    forward = LlamaForCausalLM.forward

    def counted(self, *args, **kwargs):
        if kwargs["input_ids"].numel() > 1:  # one token: the question how this architecture makes logits
            passes.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    def chosen(model):
        layout = choose_layout(model)
        passes.clear()  # of every run's trial of how rows share a pass
        return layout

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    monkeypatch.setattr("lorainit.model.base.choose_layout", chosen)
    begin(init)
    first = len(passes)
    begin(init, seed=1)
    displaced = init["method"] == "lora_one"
    assert first > len(passes) == 2 + 2 * displaced
    assert not any(passes)  # and nothing to differentiate


@pytest.mark.parametrize("init", [GRADIENT, "pissa"], ids=["evidence", "start"])
def test_every_named_part_is_in_both_names(spec, tmp_path, rows, init):
    """Base, method, parameters, rank, targets, rows; rows only for a method that looks at them."""
    made = spec(lora={"init": init}, cache=str(tmp_path / "cache"))
    job = prepared(made, tmp_path / "out")

    def names(**changes):
        changed = replace(job, **changes)
        return stage._keys(changed)

    def lora(**changes):
        return job.lora.model_copy(update=changes)

    looks = init == GRADIENT
    other = "lora_one" if looks else "milora"
    parameter = job.lora.method.model_copy(update={"samples": 3} if looks else {"niter": 2})
    found = [
        names(),
        names(base=replace(job.base, sha256="another")),
        names(lora=lora(init=INITS[other].model_validate({"method": other}))),
        names(lora=lora(init=parameter)),
        names(lora=lora(r=2)),
        names(lora=lora(alpha=9.0)),
        names(targets=dict(list(job.targets.items())[1:])),
    ]
    fewer = replace(job.data, samples=job.data.samples[1:])
    if looks:
        found.append(names(data=fewer))
    else:
        assert names(data=fewer) == names()
    assert len({n.evidence for n in found}) == len({n.starts for n in found}) == len(found)
    assert names(lora=lora(init=job.lora.method.model_copy(update={"seed": 5}))) == names()
    drawn = INITS["kaiming"](method="kaiming")  # type: ignore[call-arg]
    assert names(lora=lora(init=drawn)).starts != names(lora=lora(init=drawn.model_copy(update={"seed": 5}))).starts
