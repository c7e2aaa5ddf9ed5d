"""The initializations as typed, torch-free parameters, each beside what it needs and promises.

The same classes check a request, are stored with the job, configure the run and make the catalogue. They
lie by what they look at: nothing (`plain`), the base weight (`weights`), or rows (`data`).
"""

from typing import Annotated, Literal

from pydantic import Field

from lorainit.config.inits.base import CalibratedConfig, ExportRank, ExportRanks, InitConfig, Method, Need, Quantization
from lorainit.config.inits.data import EVA, HRP, CorDA, LoRAGA, LoRAOne
from lorainit.config.inits.plain import Gaussian, Kaiming, Orthogonal
from lorainit.config.inits.weights import LoftQ, LoRAM, MiLoRA, OLoRA, PiSSA
from lorainit.config.schema import Strict

__all__ = [
    "EVA",
    "HRP",
    "INITS",
    "AnyInit",
    "Automatic",
    "CalibratedConfig",
    "CorDA",
    "ExportRank",
    "ExportRanks",
    "Gaussian",
    "Init",
    "InitConfig",
    "Kaiming",
    "LoRAGA",
    "LoRAM",
    "LoRAOne",
    "LoftQ",
    "Method",
    "MiLoRA",
    "Need",
    "OLoRA",
    "Orthogonal",
    "PiSSA",
    "Quantization",
]


class Automatic(Strict):
    """Let the server choose; the choice and its reason are reported."""

    method: Literal["auto"] = "auto"


AnyInit = (
    Kaiming | Gaussian | Orthogonal | PiSSA | MiLoRA | OLoRA | LoRAM | LoRAGA | LoRAOne | HRP | EVA | CorDA | LoftQ
)
Init = Annotated[AnyInit | Automatic, Field(discriminator="method")]

INITS: dict[str, type[AnyInit]] = {
    "kaiming": Kaiming,
    "gaussian": Gaussian,
    "orthogonal": Orthogonal,
    "pissa": PiSSA,
    "milora": MiLoRA,
    "olora": OLoRA,
    "loram": LoRAM,
    "lora_ga": LoRAGA,
    "lora_one": LoRAOne,
    "hrp": HRP,
    "eva": EVA,
    "corda": CorDA,
    "loftq": LoftQ,
}
