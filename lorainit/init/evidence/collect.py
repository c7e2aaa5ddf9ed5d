"""Calls the function that collects the evidence for a method."""

from collections.abc import Callable
from typing import Any

from lorainit.config.inits import InitConfig
from lorainit.context import Run
from lorainit.init.evidence import Evidence
from lorainit.init.evidence.directions import principal_directions
from lorainit.init.evidence.gradients import gradient_evidence
from lorainit.init.evidence.line_search import lora_one_evidence
from lorainit.init.evidence.moments import second_moments
from lorainit.init.evidence.originals import original_weights
from lorainit.init.evidence.preheat import preheat

COLLECTORS: dict[str, Callable[[Any, Run], dict[str, Evidence]]] = {
    "loftq": original_weights,
    "lora_ga": gradient_evidence,
    "lora_one": lora_one_evidence,
    "hrp": preheat,
    "eva": principal_directions,
    "corda": second_moments,
}


def collect(config: InitConfig, run: Run) -> dict[str, Evidence]:
    """The evidence of each target for this method. It is empty if the method needs no more than the weight."""
    collector = COLLECTORS.get(config.method)
    if collector is None:
        assert config.facts.needs in ("none", "weight"), config.facts.needs
        return {name: Evidence() for name in run.targets}
    return collector(config, run)
