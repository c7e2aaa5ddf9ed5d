"""`make bench-rates`: its data sets, what it asks for, and what its page says of a run that made the model worse."""

import argparse
import json

import pytest

from api.core.models import catalogue
from benchmarks.bench_rates import WEIGHTS, Bench, spec_of
from benchmarks.rates_page import Cell, results
from benchmarks.rates_rows import HELD_OUT_ROWS, TRAINING_ROWS, instructions, write
from lorainit.config.inits import INITS
from lorainit.config.resolve import total_steps
from lorainit.config.spec import RunSpec
from lorainit.data.formats.rows import read_rows


def cell(method, *, end, seed=0, data="examples"):
    return Cell(method=method, data=data, seed=seed, rate=1e-3, base=2.0, start=2.0, end=end, seconds=1.0)


@pytest.mark.parametrize("name", ["examples", "instructions"])
def test_a_data_set_has_as_many_valid_rows_as_every_run_needs(name, tmp_path):
    training, held_out = write(name, tmp_path, gsm8k=None)
    rows = [row.value for path in (training, held_out) for row in read_rows(path)]
    assert len(rows) == TRAINING_ROWS + HELD_OUT_ROWS


def test_the_bases_size_is_the_catalogues():
    assert catalogue.require("smollm2-135m-instruct").reference().weights == WEIGHTS


def test_no_held_out_instruction_is_trained_on(tmp_path):
    training, held_out = write("instructions", tmp_path, gsm8k=None)
    assert not set(training.read_text().splitlines()) & set(held_out.read_text().splitlines())


def test_generated_rows_are_the_same_each_time():
    assert json.dumps(instructions()) == json.dumps(instructions())


@pytest.mark.parametrize("name", INITS)
def test_a_run_is_the_default_recipe_for_sixteen_steps_of_eight(name):
    spec = RunSpec.model_validate({**spec_of(name, 0, None), "data": {"training": "x"}})
    assert spec.lora.init.method == name and spec.training.learning_rate is None
    resolved = spec.training.model_copy(update={"n_epochs": 3})
    assert (total_steps(resolved, rows=TRAINING_ROWS), spec.training.batch_size) == (16, 8)


def test_a_result_of_another_default_rate_is_measured_again(tmp_path, monkeypatch):
    measured = []

    def measure(self, spec, data, out):
        measured.append(out.name)
        return {"rate": 2e-4, "base": 2.0, "start": 2.0, "end": 1.0, "seconds": 1.0}

    monkeypatch.setattr(Bench, "_measure", measure)
    bench = Bench(argparse.Namespace(results=tmp_path), tmp_path)
    for _ in range(2):
        bench.cell("pissa", "examples", 0, None)
    monkeypatch.setattr("benchmarks.bench_rates.default_rate", lambda *_, **__: 1e-4)
    bench.cell("pissa", "examples", 0, None)
    assert measured == 2 * ["pissa-examples-0"]


def test_the_page_names_the_run_that_ended_above_its_start():
    page = results([cell("pissa", end=1.5), cell("pissa", end=2.25, seed=1)])
    assert "| `pissa` | 0.001 | **2.000 → 1.875 (worst seed +0.250)** |" in page
    assert "Runs that ended above their start: 1 of 2.\n- `pissa`, examples, seed 1: 2.000 → 2.250" in page
