"""Calls the function that collects the evidence for a method."""

from collections.abc import Callable
from typing import Any

from lorainit.config.inits import InitConfig
from lorainit.context import Run
from lorainit.init.collectors.directions import collect_principal_directions
from lorainit.init.collectors.gradients import collect_gradients
from lorainit.init.collectors.line_search import collect_for_lora_one
from lorainit.init.collectors.moments import collect_second_moments
from lorainit.init.collectors.originals import open_original_weights
from lorainit.init.collectors.preheat import preheat
from lorainit.init.evidence import Evidence

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
