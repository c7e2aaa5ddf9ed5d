"""The parts of `make bench-train` that need no competitor: figures, goals, page, and our own side on a tiny model."""

import json

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM

from benchmarks.bench_train import earlier, keep, shown
from benchmarks.bench_train import measured as measured_run
from benchmarks.train_child import Failed, Place, agreed, ours
from benchmarks.train_figures import apart, goals, ratio, speed, windows
from benchmarks.train_page import report, write_section
from benchmarks.train_plan import ROUND, TRYOUTS, Rival, Work, order, rival_arguments, spec
from benchmarks.train_rows import held_out, prepare
from lorainit.config.spec import RunSpec
from tests.lorainit.conftest import make_tokenizer, tiny_llama


def measured(seconds=1.0, *, trained=100, peak=1000, **more):
    """A run of six steps, the first of which is slow."""
    row = {"seconds": [9.0] + 5 * [seconds], "trained": 6 * [trained], "tokens": 6 * [2 * trained]}
    return {**row, "peak": peak, "peak_training": peak, "first_step": 20.0, **more}


# --- figures -------------------------------------------------------------------------------------


def test_warm_up_steps_are_not_counted():
    found = speed(measured(0.5), warmup=1)
    assert (found.useful, found.all) == (200, 400)


def test_stall_slows_the_run_but_not_its_median_step():
    row = {**measured(), "seconds": [9.0, 1.0, 1.0, 1.0, 1.0, 6.0]}
    found = speed(row, warmup=1)
    assert (found.useful, found.step) == (50, 100)


def test_run_that_is_all_warm_up_has_no_speed():
    with pytest.raises(ValueError, match="fewer than two"):
        speed(measured(), warmup=5)


def test_ratio_is_taken_within_each_round():
    found = ratio({0: 2.0, 1: 30.0, 2: 6.0}, {0: 1.0, 1: 10.0, 3: 1.0})
    assert (found.low, found.middle, found.high) == (2, 2.5, 3)


def test_ratio_of_rounds_that_nobody_shares_is_none():
    assert ratio({0: 1.0}, {1: 1.0}) is None


def test_curves_are_compared_by_the_means_of_eight_steps():
    rising = [float(i) for i in range(10)]
    assert windows(rising) == [3.5, 4.5, 5.5]
    assert apart([1.0, 2.0, 3.0], [1.0, 2.5, 2.0]) == (0.5, 1.0)


# --- goals ---------------------------------------------------------------------------------------


def test_goals_are_met_or_missed_by_the_ratio_of_the_rounds():
    runs = {"ours-bf16": {0: measured(1.0, peak=700)}, "trl-defaults": {0: measured(2.6)}}
    runs |= {"trl-tuned": {0: measured(1.7)}, "hf-bf16": {0: measured(1.5)}}
    assert [goal.met for goal in goals(runs, {}, warmup=1)] == [True, False, True, True, None]


@pytest.mark.parametrize(("off", "met"), [(0.004, True), (0.006, False)])
def test_bf16_curve_has_to_stay_close_to_fp32(off, met):
    curve = {"bf16": {"losses": 80 * [1.0]}, "fp32": {"losses": 80 * [1.0 + off]}}
    assert goals({}, curve, warmup=1)[-1].met is met


# --- plan ----------------------------------------------------------------------------------------


def test_contenders_take_turns_forwards_and_backwards():
    assert order("AB", rounds=3) == [(0, "A"), (0, "B"), (1, "B"), (1, "A"), (2, "A"), (2, "B")]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_our_spec_is_one_that_the_front_door_takes(precision, tmp_path):
    raw = spec(Work(steps=3), precision, base=tmp_path, rows=tmp_path, cache=tmp_path)
    assert RunSpec.model_validate(raw).training.batch_size == 4


def test_every_rival_does_the_same_work(tmp_path):
    rivals = [Rival("trl"), *(who for tried in TRYOUTS.values() for who in tried.values())]
    found = [rival_arguments(Work(steps=3), who, out=tmp_path) for who in rivals]
    same = ("per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "num_train_epochs", "weight_decay")
    assert {tuple(arguments[name] for name in same) for arguments in found} == {(4, 1e-3, "cosine", 1, 0.0)}


# --- rows ----------------------------------------------------------------------------------------


def test_held_out_rows_have_exactly_the_labels_that_are_wanted():
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    assert [r["labels"] for r in held_out([row, row, row], 3)] == [[-100, -100, 7, 8], [-100, -100, 7, -100]]


def test_too_few_held_out_tokens_are_refused():
    with pytest.raises(ValueError, match="have 1 trained tokens"):
        held_out([{"input_ids": [5, 6], "labels": [-100, 6]}], 2)


def test_run_that_took_other_rows_is_no_comparison():
    assert agreed([3, 4, 5, 6], [7, 18], 2) == [7, 11]
    with pytest.raises(Failed, match="other rows"):
        agreed([3, 4, 5, 6], [8, 18], 2)


# --- page and results ----------------------------------------------------------------------------


def test_page_shows_who_ran_and_says_who_did_not():
    found = {("round", name, 0): measured(held_out=1.25) for name in ROUND[:-1]}
    found["round", ROUND[-1], 0] = {"skipped": "did not end in 600 s"}
    found |= {("hf-bf16", name, 0): measured(i) for i, name in enumerate(TRYOUTS["hf-bf16"], start=1)}
    text = report(found, Work(steps=6), warmup=1, threads=None)
    assert "| TRL SFTTrainer, tuned | 100 | 100 (100–100) | 200 | 1.00× | 0 | 0 | 1.250 | 20 |" in text
    assert "- Lorainit, fp32: not measured, did not end in 600 s" in text
    assert "| HF Trainer + PEFT, bf16 | shuffled | 100 | 200 | 0 | taken |" in text
    assert "| bf16: ≥ 2.5× the useful tokens per second of TRL's defaults | 1.00×" in text


def test_figures_replace_their_own_section_and_nothing_else(tmp_path):
    page = tmp_path / "speed.md"
    page.write_text("by hand\n<!-- mine -->\nold\n<!-- /mine -->\n<!-- yours -->\nkept\n<!-- /yours -->\n")
    write_section(page, "mine", "new")
    assert (
        page.read_text() == "by hand\n<!-- mine -->\n\nnew\n\n<!-- /mine -->\n<!-- yours -->\nkept\n<!-- /yours -->\n"
    )


def test_page_without_a_place_for_the_figures_is_refused(tmp_path):
    page = tmp_path / "speed.md"
    page.write_text("by hand\n")
    with pytest.raises(ValueError, match="no place for mine"):
        write_section(page, "mine", "new")


def test_results_of_other_settings_are_not_mixed(tmp_path):
    path = tmp_path / "results.jsonl"
    assert earlier(path, {"steps": 3}) == {}
    keep(path, ("round", "hf-bf16", 1), measured())
    assert earlier(path, {"steps": 3}) == {("round", "hf-bf16", 1): measured()}
    with pytest.raises(SystemExit, match="other settings"):
        earlier(path, {"steps": 4})


def test_a_run_of_ours_shows_what_a_step_costs_a_processor():
    assert "1.50 s of a processor a step" in shown(measured(processor=[40.0, 1.0, 2.0, 1.0, 2.0, 1.5]), warmup=1)
    assert "processor" not in shown(measured(), warmup=1)


# --- our own side --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny base, and six prepared rows."""
    folder = tmp_path_factory.mktemp("place")
    base, data = folder / "base", folder / "data"
    tiny_llama().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    data.mkdir()
    rows = [{"question": f"What is {i} and {i}?", "answer": i * "It is four. "} for i in range(1, 9)]
    for name in ("train.jsonl", "test.jsonl"):
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(base, data, folder / "rows", rows=6, seed=0, max_length=64, held=20)
    return Place(folder / "rows", competitors=folder, limit=600.0, threads=1)


@pytest.fixture(scope="module")
def found(place, tmp_path_factory):
    """What was measured of a run of ours of three steps, whose adapter was judged."""
    work = Work(steps=3, batch=2, r=2, max_length=64)
    return measured_run("fp32", work, place, tmp_path_factory.mktemp("run") / "out", judged=True)


def test_our_own_run_is_measured_through_the_front_door(found):
    assert [len(found[name]) for name in ("seconds", "tokens", "trained", "losses")] == [3, 3, 3, 3]
    assert all(0 < trained < tokens for trained, tokens in zip(found["trained"], found["tokens"], strict=True))
    assert min(found["seconds"]) > 0 and found["first_step"] > found["seconds"][0]
    assert len(found["processor"]) == 3 and min(found["processor"]) >= 0 < sum(found["processor"])
    assert 2**26 < found["peak_training"] <= found["peak"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it
def test_adapter_is_judged_by_stock_pefts_loss_over_the_held_out_rows(place, found):
    base = AutoModelForCausalLM.from_pretrained(place.rows / "base", dtype="float32")
    model = PeftModel.from_pretrained(base, found["adapter"]).eval()
    held = json.loads((place.rows / "held.json").read_text())
    total = sum(_stock_loss(model, held_row) for held_row in held)
    assert found["held_out"] == pytest.approx(total / 20, rel=1e-5)


@torch.no_grad()
def _stock_loss(model, row):
    """Nats of all labels of a row."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    logits = model(input_ids=ids).logits[0]
    return float(F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum"))


def test_run_that_fails_says_why(place, tmp_path):
    with pytest.raises(Failed, match=r"exit code 2: .*lora\.r: "):
        ours(Work(steps=3, r=0), "fp32", place, tmp_path / "out")


def test_run_that_takes_too_long_is_ended(place, tmp_path):
    hurried = Place(place.rows, place.competitors, limit=0.1)
    with pytest.raises(Failed, match=r"did not end in 0\.1 s"):
        ours(Work(steps=3, batch=2, r=2, max_length=64), "fp32", hurried, tmp_path / "out")
