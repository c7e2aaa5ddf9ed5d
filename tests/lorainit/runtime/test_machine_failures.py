"""A GPU that fails says nothing of the base or the adapter that is looked at just then: no look makes a verdict of it.

Each place that takes most errors for a fault of what it looks at meets CUDA's own words here.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorainit.config.errors import UnusableDevice
from lorainit.export import check, early_check, outputs
from lorainit.model import layout
from lorainit.model.source import causal
from lorainit.model.targets import peft_support
from lorainit.run import run
from tests.lorainit.conftest import no_early_check
from tests.lorainit.runtime.distributed.test_run_errors import alike, together

WORDS = "CUDA error: uncorrectable ECC error encountered\nCompile with `TORCH_USE_CUDA_DSA` to enable assertions."


def broken(*_args, **_named):
    raise RuntimeError(WORDS)


LOOKS = {
    "the narrow copy of the base": (causal, "_filled"),
    "the layers tried with PEFT": (peft_support, "_observe"),
    "loading the base": (AutoModelForCausalLM, "from_pretrained"),
    "the layouts": (layout, "run_rows"),
    "the first pass with adapters": (early_check, "observe"),
    "PEFT loading the adapter": (check, "load_with_stock_peft"),
    "the comparison": (check, "_compare"),
    "what serving keeps": (outputs.fidelity, "measure"),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_gpu_that_fails_in_a_look_is_told_as_such(spec, tmp_path, monkeypatch, look):
    peft_support._refusals.cache_clear()
    monkeypatch.setattr(*LOOKS[look], broken)
    with pytest.raises(
        UnusableDevice, match="The GPU failed while the run was using it: CUDA error: uncorrectable ECC"
    ):
        run(spec(), tmp_path, lambda event: None)


def test_of_several_layers_none_is_blamed_when_the_gpu_fails_in_the_search_for_the_culprit(spec, tmp_path, monkeypatch):
    def wrong(*_args, **_named):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(early_check, "observe", wrong)
    monkeypatch.setattr(early_check, "logits_of", broken)
    with pytest.raises(UnusableDevice):
        run(spec(), tmp_path, lambda event: None)


@pytest.mark.parametrize(
    "look",
    [
        "the comparison",
        *(pytest.param(look, marks=pytest.mark.slow) for look in ("PEFT loading the adapter", "what serving keeps")),
    ],
)
def test_a_gpu_that_fails_while_one_of_several_is_verified_is_no_verdict_on_any(spec, tmp_path, monkeypatch, look):
    monkeypatch.setattr(*LOOKS[look], broken)
    with no_early_check(), pytest.raises(UnusableDevice):
        together(alike(spec), tmp_path)


def test_a_kernel_that_was_not_built_for_the_gpu_leaves_it_to_another_layout(spec, tmp_path, monkeypatch):
    """The process goes on after it, and the next layout may have no need of that kernel."""
    see, seen = layout.run_rows, []

    def once(*args, **named):
        seen.append(torch.is_grad_enabled())
        if len(seen) == 1:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
        return see(*args, **named)

    monkeypatch.setattr(layout, "run_rows", once)
    heard = []
    run(spec(), tmp_path, heard.append)
    assert any("no kernel image is available" in getattr(event, "message", "") for event in heard)
