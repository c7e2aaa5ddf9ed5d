"""Gathering evidence: which collector serves which need."""

from lorainit.config.inits import EVA, HRP, CorDA, InitConfig, LoftQ, LoRAGA, LoRAOne
from lorainit.init.evidence import Evidence
from lorainit.init.evidence.context import Context
from lorainit.init.evidence.directions import principal_directions
from lorainit.init.evidence.gradients import gradient_evidence
from lorainit.init.evidence.moments import second_moments
from lorainit.init.evidence.originals import original_weights
from lorainit.init.evidence.preheat import preheat


def collect(config: InitConfig, context: Context) -> dict[str, Evidence]:
    """The evidence of each target for this method."""
    if isinstance(config, LoftQ):
        return original_weights(context)
    if config.facts.needs in ("none", "weight"):
        return {name: Evidence() for name in context.targets}
    if isinstance(config, LoRAGA | LoRAOne):
        return gradient_evidence(config, context)
    if isinstance(config, HRP):
        return preheat(config, context)
    if isinstance(config, EVA):
        return principal_directions(config, context)
    if isinstance(config, CorDA):
        return second_moments(config, context)
    raise AssertionError(config.facts.needs)
