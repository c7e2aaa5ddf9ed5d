"""Query values that several lists share. An empty string counts as absent."""

from typing import Annotated, Any

from fastapi import Query
from pydantic import BeforeValidator, Field


def _absent_when_empty(value: Any) -> Any:
    return None if value == "" else value


Empty = BeforeValidator(_absent_when_empty)
Text = Annotated[str, Field(max_length=255)]
After = Annotated[Text | None, Empty, Query(description="Id of the last element of the page before.")]
Limit100 = Annotated[Annotated[int, Field(ge=1, le=100)] | None, Empty, Query()]
Limit1000 = Annotated[Annotated[int, Field(ge=1, le=1000)] | None, Empty, Query()]
Limit10000 = Annotated[Annotated[int, Field(ge=1, le=10_000)] | None, Empty, Query()]
