"""LoftQ: the published correction at every scale, on the base that everybody has."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from lorainit.config.errors import UnsupportedInit
from lorainit.config.events import InitReport, Message
from lorainit.config.inits.quantized import LoftQ
from lorainit.data.batches import collate
from lorainit.data.reader import load
from lorainit.init.collectors.collect import collect
from lorainit.init.evidence import Evidence
from lorainit.init.initialize import _rise, initialize
from lorainit.init.methods import METHODS
from lorainit.model.forward.loss import logits_of
from lorainit.model.layers.layer import disable_adapters
from lorainit.model.load import load_model
from lorainit.model.targets.targets import find_linear_layers, find_targets
from lorainit.run import run
from tests.lorainit.conftest import make_tokenizer
from tests.lorainit.reference import context, tiny

CPU = torch.device("cpu")
SCALES = [0.25, 1.0, 2.0, 8**0.5]


def nf4(W):
    return dequantize_4bit(*quantize_4bit(W, quant_type="nf4", blocksize=64, compress_statistics=False))


@pytest.fixture(scope="module")
def toy():
    """A 64×64 layer of normal weights, and the same in NF4."""
    W = tiny().get_parameter("model.layers.0.self_attn.q_proj.weight")
    return W, nf4(W)


def factors(W, Q, *, scale, rank=8):
    generator = torch.Generator().manual_seed(0)
    config = LoftQ(method="loftq")
    return METHODS["loftq"](Q, Evidence(original=W), rank=rank, scale=scale, config=config, generator=generator)


def error(W, Q, product=0.0):
    return float((W - Q - product).norm() / W.norm())


@pytest.mark.parametrize("scale", SCALES)
def test_the_corrected_error_is_the_published_one_whatever_the_scale(toy, scale):
    W, Q = toy
    found = factors(W, Q, scale=scale)
    assert error(W, Q) == pytest.approx(0.0937, abs=5e-5)
    assert error(W, Q, scale * found.B @ found.A) == pytest.approx(0.0744, abs=5e-5)
    assert found.facts["quantization_error"] == pytest.approx(error(W, Q), rel=1e-5)
    assert found.facts["corrected_error"] == pytest.approx(error(W, Q, scale * found.B @ found.A), rel=1e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_the_product_is_the_best_low_rank_part_of_what_was_lost_split_evenly(toy, scale):
    W, Q = toy
    found = factors(W, Q, scale=scale)
    U, S, Vh = torch.linalg.svd(W - Q)
    best = U[:, :8] * S[:8] @ Vh[:8]
    assert float((scale * found.B @ found.A - best).norm() / best.norm()) < 0.01  # the sketch, on a flat spectrum
    assert torch.allclose(found.A @ found.A.T, found.B.T @ found.B, atol=1e-6)


@pytest.mark.parametrize(("scale", "published"), [(2.0, 0.0937), (0.25, 0.0858)])
def test_without_dividing_by_the_scale_the_correction_misses(toy, scale, published):
    """PEFT's defect: at s = 2 the error is mirrored and no smaller than before, at 0.25 a quarter is corrected."""
    W, Q = toy
    unscaled = factors(W, Q, scale=1.0)
    missed = error(W, Q, scale * unscaled.B @ unscaled.A)
    assert missed == pytest.approx(published, abs=5e-5)
    assert missed > error(W, Q, unscaled.B @ unscaled.A) + 0.01


def test_more_iterations_would_leave_the_base_that_everybody_has(toy):
    """Five rounds of the paper correct more (0.0637), but what is quantized is no longer W: why they are refused."""
    W, first = toy
    rest = W
    for _ in range(5):
        Q = nf4(rest)
        U, S, Vh = torch.linalg.svd(W - Q)
        product = U[:, :8] * S[:8] @ Vh[:8]
        rest = W - product
    assert error(W, Q, product) == pytest.approx(0.0637, abs=5e-5)
    assert error(W, Q) > error(W, first)
    assert float((Q - first).norm() / W.norm()) > 0.05


def test_a_weight_that_four_bits_hold_exactly_is_refused(toy):
    Q = toy[1]
    with pytest.raises(UnsupportedInit, match="nothing to correct"):
        factors(nf4(Q), nf4(Q), scale=1.0)


# --- on a model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["wide-llama", "wide-gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_start_is_nearer_to_the_full_precision_model_than_nf4_alone(bases, rows, base, rslora):
    samples = load(rows, make_tokenizer(), max_length=256).samples
    batch = collate(samples[:4], pad=0)
    full = load_model(bases[base], dtype=torch.float32, device=CPU)
    model = load_model(bases[base], dtype=torch.float32, device=CPU, quantization="nf4")
    init = {"init": "loftq", "r": 16, "alpha": 64.0, "use_rslora": rslora, "quantization": "nf4"}
    found = context(model, samples, init.pop("init"), **init, folder=bases[base])
    report = initialize(
        model, found.targets, found.lora, seed=0, probe=batch, evidence=collect(found.lora.method, found),
        on_event=lambda event: None,
    )  # fmt: skip
    with torch.no_grad():
        wanted, start = logits_of(full, batch), logits_of(model, batch)
        with disable_adapters(model):
            plain = logits_of(model, batch)
    assert float((start - wanted).norm()) < 0.8 * float((plain - wanted).norm())
    summary = report.summary["quantization_error"]
    assert 0.08 < summary["before"] < 0.11
    assert summary["after"] < 0.75 * summary["before"]
    module = report.modules[0]
    assert module["corrected_error"] < module["quantization_error"]


def test_the_originals_lie_in_the_file_until_they_are_read(bases, rows):
    samples = load(rows, make_tokenizer(), max_length=256).samples
    model = load_model(bases["wide-llama"], dtype=torch.float32, device=CPU, quantization="nf4")
    found = context(model, samples, "loftq", quantization="nf4", folder=bases["wide-llama"])
    evidence = collect(found.lora.method, found)
    full = find_linear_layers(load_model(bases["wide-llama"], dtype=torch.float32, device=CPU))
    ranges = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(".safetensors")
    ]
    assert evidence.keys() == find_targets(model, "all-linear").keys()
    for name, seen in evidence.items():
        assert torch.equal(seen.original, full[name].weight)
        assert any(low <= seen.original.data_ptr() < high for low, high in ranges), name


def test_a_run_reports_the_errors_and_the_loss_on_both_sides(spec, tmp_path):
    events = []
    run(spec("wide-llama", lora={"init": "loftq", "r": 8, "quantization": "nf4"}), tmp_path, events.append)
    (report,) = [e.report for e in events if isinstance(e, InitReport)]
    assert report["function_preserving"] is False
    assert report["quantization_error"]["after"] < report["quantization_error"]["before"]
    assert report["calibration_loss"].keys() == {"before", "after", "rows"}
    rose = [e for e in events if isinstance(e, Message) and "starts away from the base model" in e.message]
    assert bool(rose) == (report["calibration_loss"]["after"] > report["calibration_loss"]["before"])


def test_a_rise_comes_with_its_own_remedy():
    (text,) = _rise(LoftQ(method="loftq"), {"before": 1.0, "after": 1.5, "rows": 4})
    assert "larger r" in text
    assert "gamma" not in text
    assert _rise(LoftQ(method="loftq"), {"before": 1.5, "after": 1.0, "rows": 4}) == []
