"""Translates field names of the library (`lorainit.config.spec.RunSpec`) into those of a request's body.

The library knows no HTTP, so errors, choices and events of a run are translated when they enter the service.
"""

from typing import Any

_ELSEWHERE = {
    "data.training": "training_file",
    "data.validation": "validation_file",
    "data.calibration": "lora.init.calibration_file",
    "data.on_row_error": "on_row_error",
    "data.append_eos": "append_eos",
    "devices": "resources.devices",
    "member": "resources.group",
}
_TRAINING = "training"
_NAMED = ("param", "file")  # keys of an event's data that hold the name of a field


def translate_field(field: str | None, *, method: str = "supervised") -> str | None:
    """The path of a field of the library in a request for a job with this method. Other names stay as they are."""
    if field is None:
        return None
    head, dot, rest = field.partition(".")
    if head == _TRAINING:
        return f"method.{method}.hyperparameters{dot}{rest}"
    return _ELSEWHERE.get(field, field)


def translate_event_data(data: dict[str, Any]) -> dict[str, Any]:
    """An event's data, with field names as the caller knows them."""
    found = {key: translate_field(data[key]) for key in _NAMED if isinstance(data.get(key), str)}
    return {**data, **found}


def translate_choice(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of the library as the caller knows it."""
    return {**choice, "param": translate_field(choice["param"])}
