"""The parameters of each initialization as typed models, with the facts that the catalogue shows. Loads no torch.

The same classes check a request, are stored with the job, configure the run and make the catalogue. They are grouped
by what they use: nothing (`plain`), the base weight (`weights`), rows of data (`data`), or the error that quantization
made (`quantized`). Every class in these files is found by itself, so a new one needs no entry in a list.
"""

from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal, Union, get_args

from pydantic import Field

from lorainit.config.inits import data, plain, quantized, weights
from lorainit.config.inits.base import CalibratedConfig, ExportRank, ExportRanks, InitConfig, Method, Need, Quantization
from lorainit.config.schema import Strict

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


class Automatic(Strict):
    """Let the server choose the initialization; the job reports the choice and its reason."""

    method: Literal["auto"] = "auto"


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
