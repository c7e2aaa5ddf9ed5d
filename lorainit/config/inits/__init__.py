"""The initializations as typed, torch-free parameters, each beside what it needs and promises.

The same classes check a request, are stored with the job, configure the run and make the catalogue. They
lie by what they look at: nothing (`plain`), the base weight (`weights`), rows (`data`), or what quantization has lost
(`quantized`). Every class of these files is an initialization: nobody has to list it.
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
    """Let the server choose; the choice and its reason are reported."""

    method: Literal["auto"] = "auto"


def _defined_in(module: ModuleType) -> dict[str, type[InitConfig]]:
    """The initializations of a file by name, in the order of their classes."""
    found = (value for value in vars(module).values() if isinstance(value, type) and issubclass(value, InitConfig))
    kinds = (kind for kind in found if kind.__module__ == module.__name__)
    return {get_args(kind.model_fields["method"].annotation)[0]: kind for kind in kinds}


# In the order of the catalogue.
INITS = {name: kind for module in (plain, weights, data, quantized) for name, kind in _defined_in(module).items()}

if TYPE_CHECKING:
    Init = InitConfig | Automatic
else:  # made of the table, which no type checker can read
    Init = Annotated[Union[(*INITS.values(), Automatic)], Field(discriminator="method")]
