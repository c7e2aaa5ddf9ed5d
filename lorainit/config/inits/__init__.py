"""The parameters of each initialization as typed models, with the facts that the catalogue shows. Loads no torch.

The same classes check a request, are stored with the job, configure the run and make the catalogue. They are grouped
by what they use: nothing (`plain`), the base weight (`weights`), rows of data (`data`), or the error that quantization
made (`quantized`). Every class in these files is found by itself, so a new one needs no entry in a list.
"""

from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal, Union, get_args

from pydantic import Field, StringConstraints, field_validator

from lorainit.config.inits import data, plain, quantized, weights
from lorainit.config.inits.base import CalibratedConfig, ExportRank, ExportRanks, InitConfig, Method, Need, Quantization
from lorainit.config.schema import Auto, Strict, refusal

__all__ = [
    "INITS",
    "Automatic",
    "CalibratedConfig",
    "ExportRank",
    "ExportRanks",
    "Init",
    "InitConfig",
    "Method",
    "Need",
    "Quantization",
]

MethodName = Annotated[str, StringConstraints(max_length=64)]


class Automatic(Strict):
    """Let the server choose the initialization, and the learning rate unless one is given.

    The service tries a few of both on the job's own rows (`api.core.experiments.auto`). `candidates`: the methods it
    may choose from, null = its own list; of equally good ones it takes the first. `probe_steps`: the most optimizer
    steps that may be spent on those that are not chosen, "auto" = a quarter of the job's steps. Without the service, or
    where there is nothing to compare by, `Lora.resolve` chooses by a rule.
    """

    method: Literal["auto"] = "auto"
    candidates: Annotated[list[MethodName], Field(min_length=2, max_length=8, fail_fast=True)] | None = None
    probe_steps: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = "auto"

    @field_validator("candidates")
    @classmethod
    def can_be_tried(cls, names: list[str] | None) -> list[str] | None:
        """Refuse a method that is named twice, does not exist, or trains before its start."""
        for place, name in enumerate(names or []):
            if name in (names or [])[:place]:
                raise refusal("", f"candidates holds {name!r} twice: each method once.", code="invalid_value")
            if name not in INITS:
                text = f"candidates[{place}] {name!r} is no initialization: {', '.join(INITS)}."
                raise refusal("", text, code="invalid_value")
            if INITS[name].facts.needs == "preheat":
                text = f"{name} trains before its start, which costs more steps than trying it may: leave it out."
                raise refusal("", text)
        return names


def _defined_in(module: ModuleType) -> dict[str, type[InitConfig]]:
    """The initializations of a file by name, in the order of their classes."""
    found = (value for value in vars(module).values() if isinstance(value, type) and issubclass(value, InitConfig))
    kinds = (kind for kind in found if kind.__module__ == module.__name__)
    return {_method_of(kind): kind for kind in kinds}


def _method_of(kind: type[InitConfig]) -> str:
    if "method" not in kind.model_fields or not hasattr(kind, "facts"):
        raise TypeError(f"{kind.__name__} needs `method: Literal[...]` and `facts`, as docs/add-a-method.md shows.")
    name: str = get_args(kind.model_fields["method"].annotation)[0]
    return name


# The catalogue shows them in this order.
INITS = {name: kind for module in (plain, weights, data, quantized) for name, kind in _defined_in(module).items()}

if TYPE_CHECKING:
    Init = InitConfig | Automatic
else:  # built at run time from the table, because a type checker cannot read a table
    Init = Annotated[Union[(*INITS.values(), Automatic)], Field(discriminator="method")]
