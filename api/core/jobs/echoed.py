"""Fields of an earlier job's answer that a request sends back. They must be true for this request, too."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from api.core.errors import InvalidValue
from api.core.models import catalogue
from api.core.models.catalogue import Entry
from lorainit.config.paths import matches
from lorainit.config.spec import Lora


@dataclass(frozen=True, kw_only=True)
class EchoedFields:
    """Fields of a job's `lora` that follow from the others; None = not given."""

    modules: int | None = None
    trainable_parameters: int | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)


def require_matching(echoed: EchoedFields, lora: Lora, entry: Entry) -> None:
    """Refuse values that this request does not lead to, because ignoring them would mislead the caller.

    A method that distributes the ranks by its rows does so in the run. Until then a rank pattern only has to be
    possible: full names of adapted layers, and no more than r for each on average.

    Args:
        lora: with its target modules resolved for the entry.

    Raises:
        InvalidValue: one of the values differs.
    """
    modules, parameters = catalogue.count_parameters(lora, entry)
    spread = lora.method.export_rank == "per module"
    if echoed.rank_pattern and not (spread and _could_be_spread(echoed.rank_pattern, lora)):
        why = "is chosen by the initialization" if spread else f"is empty for init {lora.init.method!r}"
        raise _refusal("rank_pattern", f"{why}: it cannot be set; r sets the rank")
    if echoed.modules not in (None, modules):
        raise _refusal("modules", f"(got {echoed.modules}) follows from target_modules, which make it {modules}")
    if not echoed.rank_pattern and echoed.trainable_parameters not in (None, parameters):
        why = f"follows from r and target_modules, which make it {parameters}"
        raise _refusal("trainable_parameters", f"(got {echoed.trainable_parameters}) {why}")


def _could_be_spread(ranks: Mapping[str, int], lora: Lora) -> bool:
    full = all("." in name and any(matches(name, one) for one in lora.target_modules) for name in ranks)
    return full and min(ranks.values()) >= 0 and sum(rank - lora.r for rank in ranks.values()) <= 0


def _refusal(name: str, text: str) -> InvalidValue:
    return InvalidValue(f"lora.{name} {text}.", code="invalid_value", param=f"lora.{name}")
