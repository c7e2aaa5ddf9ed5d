"""The base class of every model that a caller can fill in: closed, strict, frozen. Loads no torch."""

from itertools import islice
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

Auto = Literal["auto"]
Seed = Annotated[int, Field(ge=0, le=2_147_483_647)]
UNKNOWN = 8  # at most so many unknown fields are reported, because one is enough to refuse the request


class Strict(BaseModel):
    """A model that refuses unknown fields, converts no values, and cannot be changed."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def null_means_absent(cls, data: Any) -> Any:
        """Drop nulls of fields that do not allow null, because clients send them for fields that they leave out.

        Of unknown fields only the first few are kept, because pydantic makes an error of each, and a request of two
        megabytes may hold very many.
        """
        if not isinstance(data, dict):
            return data
        known = {field.alias or name: name for name, field in cls.model_fields.items()}
        unknown = islice((key for key in data if key not in known), UNKNOWN)
        kept = {key for key in data if key in known and (data[key] is not None or cls._takes_null(known[key]))}
        kept.update(unknown)
        return {key: value for key, value in data.items() if key in kept}

    @classmethod
    def _takes_null(cls, name: str) -> bool:
        return type(None) in get_args(cls.model_fields[name].annotation)


def limit_size(most: int) -> BeforeValidator:
    """For a map with `max_length`: check its size before its values, because each wrong value would be an error."""

    def check(data: Any) -> Any:
        if isinstance(data, dict) and len(data) > most:
            facts = {"field_type": "Dictionary", "max_length": most, "actual_length": len(data)}
            raise PydanticKnownError("too_long", facts)
        return data

    return BeforeValidator(check)


RefusalCode = Literal["unsupported_combination", "not_supported", "invalid_value"]


def refusal(param: str, message: str, *, code: RefusalCode = "unsupported_combination") -> PydanticCustomError:
    """An error that names the field at fault; `not_supported` is for features that a later release may have."""
    # The message is passed as a value, because pydantic would take braces in a template for placeholders.
    return PydanticCustomError(code, "{message}", {"message": message, "param": param})
