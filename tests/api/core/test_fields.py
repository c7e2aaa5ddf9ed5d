"""The library speaks of its own fields, and the service says where an order has them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from api.core.fields import translate_field
from api.schemas.job_request import JobRequest
from lorainit.config.spec import Hyperparameters, Lora, RunSpec

LIBRARY = Path(__file__).parents[3] / "lorainit"
# What the command line calls a run that is trained beside another one: no field of a spec.
OPTIONS = {"member"}
# A field of a spec that no order can set: the worker does.
NOT_ORDERED = {"resume_from"}


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a field can hold, whatever unions and annotations are around them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_in(inner)


def has(models: list[type[BaseModel]], path: str) -> bool:
    """Whether one of the models has a field at this path."""
    name, _, rest = path.partition(".")
    found = [model.model_fields[name] for model in models if name in model.model_fields]
    return bool(found) and (not rest or has([m for field in found for m in models_in(field.annotation)], rest))


def named_fields() -> set[str]:
    """Every field that an error of the library is about, as written in its source."""
    text = "\n".join(path.read_text() for path in LIBRARY.rglob("*.py"))
    return set(re.findall(r"\b(?:param|PARAM|PRECISION|where|FIELD)\s*=\s*\"([a-z_.]+)\"", text))


def test_the_library_names_fields_of_its_own_spec_only() -> None:
    found = named_fields()
    assert {"training.max_length", "lora.target_modules", "model", "data.calibration"} <= found
    assert [name for name in sorted(found - OPTIONS) if not has([RunSpec], name)] == []


def test_every_field_that_the_library_names_is_somewhere_in_an_order() -> None:
    assert [
        name for name in sorted(named_fields() - NOT_ORDERED) if not has([JobRequest], translate_field(name) or "")
    ] == []


@pytest.mark.parametrize("name", Hyperparameters.model_fields)
def test_every_hyperparameter_has_its_place_in_an_order(name: str) -> None:
    assert translate_field(f"training.{name}") == f"method.supervised.hyperparameters.{name}"
    assert translate_field(f"training.{name}", method="dpo") == f"method.dpo.hyperparameters.{name}"


@pytest.mark.parametrize("field", [None, "model", *(f"lora.{name}" for name in Lora.model_fields)])
def test_what_both_call_the_same_stays(field: str | None) -> None:
    assert translate_field(field) == field


def test_a_field_that_is_translated_already_stays() -> None:
    once = translate_field("training.optimizer.damping")
    assert translate_field(once) == once == "method.supervised.hyperparameters.optimizer.damping"
