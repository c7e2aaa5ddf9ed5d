"""`make evidence`: its plan, what it keeps, what its page says of much and of little, and the replay of halving."""

import json
import math

import pytest

from api.core.experiments import ranking
from api.core.experiments.halving import RUNGS
from api.core.experiments.ranking import Noise
from api.schemas.experiment_request import ExperimentRequest
from benchmarks.evidence import claims, page, pictures, replays, store
from benchmarks.evidence import evidence as evidence_module
from benchmarks.evidence.__main__ import write_page
from benchmarks.evidence.evidence import Evidence
from benchmarks.evidence.plan import EVALUATIONS, STEPS, STUDIES, Study, compute_digest
from benchmarks.evidence.rows import HELD_OUT_ROWS, TRAINING_ROWS, write_rows
from benchmarks.evidence.store import Measured
from benchmarks.evidence.verdicts import Said, better, faster, matches
from lorainit.config.inits import INITS

FACTS = {"packages": {"torch": "2.0"}, "machine": "two cores"}
FOUND = {"kaiming": 1.1, "pissa": 1.0, "loram": 1.001}
SMALL = (Study(key="initializations", title="every initialization", inits=[{"method": name} for name in FOUND]),)


def cell(init, rate, seed, loss, *, status="succeeded", start=1.7, attempts=1):
    """A cell whose loss falls in a straight line."""
    steps = [STEPS * place // EVALUATIONS for place in range(EVALUATIONS + 1)] if status == "succeeded" else []
    return {
        "init": init, "rate": rate, "seed": seed, "status": status, "error": None, "steps": steps,
        "tokens": [100 * step for step in steps], "losses": [start + (loss - start) * step / STEPS for step in steps],
        "attempts": attempts, "init_seconds": 1.0, "cached": False,
        "stage_seconds": {"initializing": 2.0, "training": 30.0, "evaluating": 10.0}, "peak_memory_bytes": 10**9,
        "trainable_parameters": 4_884_480, "export_rank": 16, "adapter_bytes": 20_000_000,
        "finished_at": 1_790_000_000, "job_id": f"ftjob-{init}-{rate}-{seed}", "same": dict(FACTS),
    }  # fmt: skip


def measure(study, losses, *, seeds=(1, 2, 3), status="succeeded", noise=0.001):
    """An experiment's file: `losses` by initialization at the best rate, which is the second; others are 0.1 worse."""
    measured = Measured(study.key, "digest", study.planned, status=status, nice=19)
    for seed in seeds:
        for init, loss in enumerate(losses):
            for place, rate in enumerate(study.rates):
                wobble = noise * ((3 * seed + init) % 4 - 1.5)
                measured.add(cell(init, rate, seed, loss + 0.1 * abs(place - 1) + wobble))
    return measured


def evidence(**more):
    return Evidence({"initializations": measure(SMALL[0], FOUND.values(), **more)}, SMALL)


# --- the plan ---------------------------------------------------------------------------------------


def test_every_initialization_of_the_registry_is_measured():
    tried = {init["method"] for study in STUDIES for init in study.inits}
    assert tried == set(INITS)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.key)
def test_every_experiment_is_a_request_that_the_service_takes(study):
    order = ExperimentRequest.model_validate(study.make_request("file-a", "file-b")).order()
    assert not order.job.group
    assert sum(len(rates) for rates in order.rates) * len(order.seeds) == study.planned


def test_no_two_treatments_of_different_experiments_have_one_name():
    names = [name for study in STUDIES for name in study.names]
    assert len(names) == len(set(names))


def test_runs_are_evaluated_where_halving_looks():
    every = STEPS // EVALUATIONS
    assert [math.ceil(rung * STEPS) % every for rung in RUNGS] == [0, 0, 0]


def test_the_variants_of_the_magnitude_have_updates_of_equal_size():
    one, other = (next(study for study in STUDIES if study.key == key) for key in ("magnitude", "magnitude-equal"))
    divisors = one.inits[0].get("divisor", 10.0), other.inits[0]["divisor"]
    shrunk = divisors[1] / divisors[0]
    assert other.lora["alpha"] == one.lora["alpha"] * shrunk**2
    assert [rate * shrunk for rate in other.rates] == list(one.rates)


def test_a_request_for_other_rows_has_another_digest():
    first = STUDIES[0]
    assert compute_digest(first.make_request("a", "b")) == compute_digest(first.make_request("a", "b"))
    assert compute_digest(first.make_request("a", "b")) != compute_digest(first.make_request("a", "c"))


def test_every_claim_names_treatments_that_are_measured(monkeypatch):
    for module in (ranking, evidence_module):  # because the real range of so many treatments takes seconds
        monkeypatch.setattr(module, "find_critical_range", lambda *_: 4.0)
    names = {name for study in STUDIES for name in study.names}
    full = Evidence({study.key: measure(study, [1.0] * len(study.inits)) for study in STUDIES})
    assert {claims.WELL, *claims.ILL} <= names
    said = {claim.text: claim.test(full).said for claim in claims.CLAIMS}
    assert [text for text, verdict in said.items() if verdict == Said.UNMEASURED] == [claims.CLAIMS[-1].text]


def test_too_few_short_rows_are_refused(tmp_path):
    row = json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n"
    (tmp_path / "train.jsonl").write_text(row * TRAINING_ROWS)
    (tmp_path / "test.jsonl").write_text(row * (HELD_OUT_ROWS - 1))
    with pytest.raises(ValueError, match=r"test\.jsonl of this data set has 31 short rows"):
        write_rows(tmp_path, tmp_path / "rows")


# --- what is kept -----------------------------------------------------------------------------------


def test_what_was_saved_is_loaded_again(tmp_path):
    measured = measure(SMALL[0], [1.1, 1.0, 1.0])
    store.save(measured, tmp_path)
    assert store.load(tmp_path, "initializations") == measured
    assert measured.facts == [FACTS]
    assert [path.name for path in tmp_path.iterdir()] == ["initializations.json"]


# --- comparisons ------------------------------------------------------------------------------------


def test_the_ranking_is_the_services_own():
    found = evidence().everything
    assert [row.treatment for row in found.rows] == ["pissa", "loram", "kaiming"]
    assert evidence_module.rank is ranking.rank


def test_a_difference_beyond_noise_is_confirmed_and_its_opposite_is_not():
    found = evidence()
    assert better("pissa", "kaiming")(found).said == Said.CONFIRMED
    assert better("kaiming", "pissa")(found).said == Said.NOT_CONFIRMED


def test_a_difference_within_noise_is_not_confirmed():
    verdict = better("loram", "pissa")(evidence())
    assert verdict.said == Said.NOT_CONFIRMED
    assert verdict.why.startswith("No difference beyond noise between loram and pissa")


def test_two_match_if_their_difference_is_small_noise_included():
    assert matches("loram", "pissa")(evidence()).said == Said.CONFIRMED
    assert matches("kaiming", "pissa")(evidence()).said == Said.NOT_CONFIRMED
    assert matches("loram", "pissa")(evidence(noise=0.05)).said == Said.NOT_CONFIRMED


def test_a_lower_end_is_reached_in_a_part_of_the_steps():
    found = evidence()
    assert faster("pissa", "kaiming", share=0.9)(found).said == Said.CONFIRMED
    assert faster("pissa", "kaiming", share=0.5)(found).said == Said.NOT_CONFIRMED
    assert (
        faster("kaiming", "pissa", share=0.9)(found).why == "kaiming does not reach pissa's final loss with every seed."
    )


def test_nothing_is_compared_before_two_seeds_of_every_rate_have_ended():
    assert better("pissa", "kaiming")(evidence(seeds=(1,))).said == Said.UNMEASURED
    part = measure(SMALL[0], FOUND.values(), seeds=(1, 2), status="running")
    part.cells.pop()
    assert better("pissa", "loram")(Evidence({"initializations": part}, SMALL)).said == Said.UNMEASURED
    assert better("pissa", "kaiming")(Evidence({"initializations": part}, SMALL)).said == Said.CONFIRMED


def test_a_rate_at_which_runs_diverge_is_known_too():
    measured = measure(SMALL[0], FOUND.values())
    broken = [cell(one["init"], one["rate"], one["seed"], 0.0, status="failed") if one["rate"] == 3e-3 else one
              for one in measured.cells]  # fmt: skip
    measured.cells = [{**one, "facts": 0} for one in broken]
    assert better("pissa", "kaiming")(Evidence({"initializations": measured}, SMALL)).said == Said.CONFIRMED


def test_seconds_of_interrupted_runs_are_left_out():
    measured = measure(SMALL[0], FOUND.values())
    for one in measured.cells:
        one["attempts"] = 2 if one["seed"] == 1 else 1
        one["stage_seconds"] = {"training": 5.0 if one["seed"] == 1 else 30.0}
    assert Evidence({"initializations": measured}, SMALL).find_seconds("pissa", "training") == 30.0


# --- the page ---------------------------------------------------------------------------------------


def test_the_page_of_nothing_says_that_nothing_is_measured(tmp_path):
    write_page(tmp_path)
    text = (tmp_path / "evidence.md").read_text()
    planned = sum(study.planned for study in STUDIES)
    assert f"**0 of {planned} cells are measured.**" in text
    assert "Not measured yet." in text
    assert "![" not in text


def test_the_page_names_incomplete_experiments():
    text = page.make_page(evidence(seeds=(1,), status="running"), [])
    assert "**12 of 36 cells are measured.**" in text
    assert "These experiments are incomplete, so their figures may change: every initialization." in text
    assert "- every initialization: 12 of 36 cells." in text
    assert "Of one seed: at one learning rate for all, initializations lie within" in text


def test_a_change_of_the_machine_is_said_at_once():
    measured = measure(SMALL[0], FOUND.values())
    measured.facts.append({**FACTS, "machine": "eight cores"})
    measured.cells[-1]["facts"] = 1
    text = page.make_page(Evidence({"initializations": measured}, SMALL), [])
    assert (
        "machine differs between cells: 'two cores' in 35 cells; 'eight cores' in 1 cells." in text.partition("##")[0]
    )


def test_the_page_of_a_complete_experiment_has_its_ranking_and_its_pictures(tmp_path):
    found = evidence()
    text = page.make_page(found, pictures.draw_pictures(found, tmp_path))
    assert "incomplete" not in text
    assert "pissa is better than kaiming, beyond noise; loram is not distinguishable from pissa." in text
    assert "| pissa | 0.0003 | 1.0" in text
    assert {path.stem for path in tmp_path.glob("*.svg")} == set(pictures.PICTURES)
    assert all(f"evidence/{name}.svg" in text for name in pictures.PICTURES)


def test_the_same_results_give_the_same_pictures(tmp_path):
    for name in ("one", "two"):
        pictures.draw_pictures(evidence(), tmp_path / name)
    for picture in (tmp_path / "one").iterdir():
        assert picture.read_bytes() == (tmp_path / "two" / picture.name).read_bytes()


def test_negative_results_stay_on_the_page(monkeypatch):
    negative = claims.Claim("PiSSA is worse.", "nobody", better("kaiming", "pissa"))
    monkeypatch.setattr(claims, "CLAIMS", (negative,))
    text = page.make_page(evidence(), [])
    assert "0 confirmed, 1 not confirmed" in text
    assert "| PiSSA is worse. | nobody | **not confirmed** | kaiming ends" in text


# --- halving ----------------------------------------------------------------------------------------


def curve(*losses):
    """Losses at 0, 10 %, 30 %, 60 % and 100 % of the steps."""
    return [{"step": step, "valid_loss": loss} for step, loss in zip((0, 5, 15, 30, 50), losses, strict=True)]


def grid(special, *, others=8):
    """`special` beside cells that end the later the worse."""
    worse = [0.01 * number for number in range(others)]
    cells = {(f"other {one}", 1e-3): {1: curve(2.0, 1.9 + one, 1.8 + one, 1.7 + one, 1.6 + one)} for one in worse}
    return cells | {("special", 1e-3): {1: special}}


def test_a_winner_that_leads_early_is_kept_for_a_third_of_the_cost():
    found = replays.replay(grid(curve(2.0, 1.5, 1.3, 1.2, 1.0)))
    assert (found.cells, found.loss) == (9, 0.0)
    assert found.cost == pytest.approx(9 * 0.1 + 3 * 0.2 + 2 * 0.7)


def test_a_winner_that_is_behind_early_is_lost():
    found = replays.replay(grid(curve(2.0, 2.0, 1.9, 1.5, 1.0)))
    assert found.loss == pytest.approx(0.6)


def test_replays_count_how_often_the_winner_is_kept():
    noise = Noise(deviation=0.001, degrees=10, critical=3.0)
    good, bad = (
        replays.run_replays(grid(special), noise, count=50)
        for special in (curve(2.0, 1.5, 1.3, 1.2, 1.0), curve(2.0, 2.0, 1.9, 1.5, 1.0))
    )
    assert good.kept == good.within == 1.0
    assert bad.within < 0.5  # it is kept only where it was not drawn
    assert bad.worst > 0.5


def test_what_is_within_noise_of_the_winner_counts_as_kept():
    noise = Noise(deviation=1.0, degrees=10, critical=3.0)
    found = replays.run_replays(grid(curve(2.0, 2.0, 1.9, 1.5, 1.0)), noise, count=20)
    assert found.within == 1.0 and found.kept < 1.0


def test_an_incomplete_experiment_is_not_replayed():
    assert replays.describe_replays(evidence(status="running")).startswith("Not known yet")
    assert "replays, each of 9 cells" in replays.describe_replays(evidence(), count=5)
