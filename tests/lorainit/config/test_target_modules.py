"""Which layers a run adapts, decided from facts of the base alone."""

import pytest

from lorainit.config.errors import UnsupportedInit
from lorainit.config.inits import INITS
from lorainit.config.model_facts import Target
from lorainit.config.spec import Lora
from lorainit.config.target_modules import resolve_target_modules

DENSE = Target(name="q_proj", group="attention", out_features=32, in_features=32, count=2)
EXPERTS = Target(name="experts.*.up_proj", group="mlp", out_features=32, in_features=32, count=8, experts=True)
REFUSING = [name for name, kind in INITS.items() if kind.refuses_experts]


def lora(method: str, **values: object) -> Lora:
    """The adapter with a base that the method works on."""
    return Lora.model_validate({"init": method, "quantization": INITS[method].facts.quantization[0], "r": 4, **values})


def test_loftq_alone_refuses_experts() -> None:
    assert REFUSING == ["loftq"]


@pytest.mark.parametrize("method", REFUSING)
def test_a_group_leaves_out_experts_that_the_method_refuses(method: str) -> None:
    found = resolve_target_modules(lora(method), [DENSE, EXPERTS], [])
    assert found.names == ["q_proj"]
    assert [(layer.name, layer.reason) for layer in found.left_out] == [(EXPERTS.name, INITS[method].refuses_experts)]


@pytest.mark.parametrize("method", REFUSING)
def test_experts_that_were_named_are_refused_with_the_methods_reason(method: str) -> None:
    with pytest.raises(UnsupportedInit, match=INITS[method].refuses_experts):
        resolve_target_modules(lora(method, target_modules=["up_proj"]), [DENSE, EXPERTS], [])


@pytest.mark.parametrize("method", sorted(INITS.keys() - set(REFUSING)))
def test_other_methods_adapt_experts(method: str) -> None:
    assert resolve_target_modules(lora(method), [DENSE, EXPERTS], []).names == [DENSE.name, EXPERTS.name]
