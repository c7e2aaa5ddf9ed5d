"""Turns pydantic's errors into one error that a caller can act on: a code, a dotted path, a sentence.

A field is named as the caller wrote it (`lorainit.config.validation_errors`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from reprlib import Repr
from typing import Any

from lorainit.config.validation_errors import Details, drop_union_parts

_CODES = {
    "missing": "missing_required_parameter",
    "union_tag_not_found": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
    "int_from_float": "invalid_type",
}
# Raised by our own validators: the type of the error is the code, and `param` in its context completes the path.
OWN_CODES = (
    "unsupported_combination",
    "unsupported_method",
    "not_supported",
    "invalid_value",
    "integration_not_configured",
    # For a `lora` in a label, whose errors this module has translated once before.
    "invalid_type",
    "unknown_parameter",
    "missing_required_parameter",
    "unsupported_init_method",
)

_INITS = ("lora.init", "grid.init")  # where a request names an initialization

_SENTENCES = {
    "missing": "is required",
    "extra_forbidden": "is not a known field",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "string_type": "must be a string",
    "string_unicode": "must be valid Unicode",
    "bool_type": "must be true or false",
    "list_type": "must be an array",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "finite_number": "must be a finite number",
    "int_parsing": "must be an integer",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have at least {min_length} characters",
    "too_long": "must have at most {max_length} elements",
    "too_short": "must have at least {min_length} elements",
    "string_pattern_mismatch": "must match {pattern}",
    "union_tag_invalid": "must be one of {expected_tags}",
    "union_tag_not_found": "is required",
}


# Formats only as much of a value as is shown, because the value may have two megabytes or be nested deeply.
class _Brief(Repr):
    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """As the parent class, which would sort the whole dictionary first."""
        return super().repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)


_BRIEF = _Brief()
_BRIEF.maxlevel, _BRIEF.maxlong = 4, 100
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 40
_BRIEF.maxstring = _BRIEF.maxother = 400


@dataclass(frozen=True)
class Fault:
    """What is wrong, and in which field the caller wrote it."""

    code: str
    message: str
    param: str | None


def find_first_fault(errors: Sequence[Details], body: Any) -> Fault:
    """The first error. Those of the alternatives of a union at the same place become one sentence."""
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return Fault("invalid_json", f"The body is not valid JSON: {reason}.", None)
    if first["loc"] == ("body",) and first["type"] not in OWN_CODES:
        return Fault("invalid_json", "The body must be a JSON object (Content-Type: application/json).", None)
    path = _path(first, body)
    same = [error for error in errors if _path(error, body) == path]
    own = next((error for error in same if error["type"] in OWN_CODES), None)
    if own is not None:
        return _own(own, path)
    if first["type"].startswith("union_tag"):
        path = f"{path}.{_discriminator(first)}"
    wrong = " or ".join(dict.fromkeys(_sentence(error) for error in same)).replace(" or must be ", " or ")
    got = "" if first["type"] in ("missing", "union_tag_not_found") else f" (got {_shown(_value(first))})"
    return Fault(_code(same, path), f"{path} {wrong}{got}.", path)


def _own(error: Details, path: str) -> Fault:
    field = error.get("ctx", {}).get("param")
    where = ".".join(part for part in (path, field) if part)
    message = error["msg"] if where in error["msg"] else f"{where}: {error['msg']}"
    return Fault(error["type"], message, where)


def _path(error: Details, body: Any) -> str:
    """The location as in the caller's body: `integrations[0].wandb.project`."""
    source, *location = error["loc"]
    if source in ("query", "path", "header"):
        return ".".join(str(part) for part in location)
    parts = drop_union_parts(location, body, missing=error["type"] == "missing")
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def _code(same: Sequence[Details], path: str) -> str:
    kinds = [error["type"] for error in same]
    if kinds[0] == "union_tag_invalid":
        return "unsupported_init_method" if path.startswith(_INITS) else "invalid_value"
    if kinds[0] in _CODES:
        return _CODES[kinds[0]]
    plain = [kind for kind in kinds if not kind.endswith("_type") and kind not in ("literal_error", "int_from_float")]
    return "invalid_value" if plain or kinds[0] == "literal_error" else "invalid_type"


def _sentence(error: Details) -> str:
    template = _SENTENCES.get(error["type"])
    if template is None:
        text = str(error["msg"])
        return "is invalid: " + text[:1].lower() + text[1:]
    return template.format_map(error.get("ctx", {}))


def _discriminator(error: Details) -> str:
    return str(error.get("ctx", {}).get("discriminator", "'method'")).strip("'")


def _value(error: Details) -> Any:
    if error["type"] == "union_tag_invalid":
        return error.get("ctx", {}).get("tag")
    return error.get("input")


def _shown(value: Any) -> str:
    text = _BRIEF.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
