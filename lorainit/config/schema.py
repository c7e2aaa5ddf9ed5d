"""The base of every model a caller can fill in: closed, strict, frozen. Torch-free."""

from itertools import islice
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

Auto = Literal["auto"]
Seed = Annotated[int, Field(ge=0, le=2_147_483_647)]
UNKNOWN = 8  # fields that a model does not have and that it is told of: the first one is reason enough to refuse


class Strict(BaseModel):
    """Frozen, strict, closed: the base of every model a caller can fill in."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def null_means_absent(cls, data: Any) -> Any:
        """Drop explicit nulls of fields for which null is no value (clients send them freely).

        Unknown fields are dropped too but for the first few: two megabytes of them would be as many errors.
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
    """For a map with `max_length`: its size is looked at first, or each of its values could be an error."""

    def check(data: Any) -> Any:
        if isinstance(data, dict) and len(data) > most:
            facts = {"field_type": "Dictionary", "max_length": most, "actual_length": len(data)}
            raise PydanticKnownError("too_long", facts)
        return data

    return BeforeValidator(check)


def refusal(
    param: str, message: str, *, code: Literal["unsupported_combination", "not_supported"] = "unsupported_combination"
) -> PydanticCustomError:
    """A refusal that names the field at fault; `not_supported` is what a later release may bring."""
    # The message is passed as a value, so braces in it are never taken for placeholders.
    return PydanticCustomError(code, "{message}", {"message": message, "param": param})
