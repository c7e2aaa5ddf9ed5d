"""Calls the function that collects the evidence for a method."""

from collections.abc import Callable
from typing import Any

from lorainit.config.inits import InitConfig
from lorainit.context import Run
from lorainit.init.evidence import Evidence
from lorainit.init.evidence.directions import collect_principal_directions
from lorainit.init.evidence.gradients import collect_gradients
from lorainit.init.evidence.line_search import collect_for_lora_one
from lorainit.init.evidence.moments import collect_second_moments
from lorainit.init.evidence.originals import open_original_weights
from lorainit.init.evidence.preheat import preheat

COLLECTORS: dict[str, Callable[[Any, Run], dict[str, Evidence]]] = {
    "loftq": open_original_weights,
    "lora_ga": collect_gradients,
    "lora_one": collect_for_lora_one,
    "hrp": preheat,
    "eva": collect_principal_directions,
    "corda": collect_second_moments,
}


def collect(config: InitConfig, run: Run) -> dict[str, Evidence]:
    """The evidence of each target for this method. It is empty if the method needs no more than the weight."""
    collector = COLLECTORS.get(config.method)
    if collector is None:
        assert config.facts.needs in ("none", "weight"), config.facts.needs
        return {name: Evidence() for name in run.targets}
    return collector(config, run)
