"""The base of every model a caller can fill in: closed, strict, frozen. Torch-free."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Auto = Literal["auto"]
Seed = Annotated[int, Field(ge=0, le=2_147_483_647)]


class Strict(BaseModel):
    """Frozen, strict, closed: the base of every model a caller can fill in."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def null_means_absent(cls, data: Any) -> Any:
        """Drop explicit nulls of fields for which null is no value (clients send them freely)."""
        if not isinstance(data, dict):
            return data
        return {
            key: value
            for key, value in data.items()
            if value is not None or key not in cls.model_fields or cls._takes_null(key)
        }

    @classmethod
    def _takes_null(cls, name: str) -> bool:
        return type(None) in get_args(cls.model_fields[name].annotation)


def refusal(
    param: str, message: str, *, code: Literal["unsupported_combination", "not_supported"] = "unsupported_combination"
) -> PydanticCustomError:
    """A refusal that names the field at fault; `not_supported` is what a later release may bring."""
    # The message is passed as a value, so braces in it are never taken for placeholders.
    return PydanticCustomError(code, "{message}", {"message": message, "param": param})
