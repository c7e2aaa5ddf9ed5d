"""The warning about too few calibration rows, which several collectors emit."""

from lorainit.config.events import Message
from lorainit.config.inits.data import EVA, CorDA, LoRAGA, LoRAOne


def warn_few_rows(config: LoRAGA | LoRAOne | EVA | CorDA, found: int) -> Message:
    """The warning that fewer rows were found than the method asked for."""
    text = f"{config.method} asked for {config.samples} calibration rows and there are {found}: all are used."
    return Message(level="warn", message=text, data={"kind": "init", "samples": found, "asked": config.samples})
