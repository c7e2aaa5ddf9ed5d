"""What a method says that the seed changes is what the seed changes: its factors, its evidence, or nothing."""

from dataclasses import replace

import pytest
import torch

from lorainit.config.inits import INITS
from lorainit.init.collectors.collect import collect
from lorainit.init.methods import METHODS
from tests.lorainit.contexts import make_context
from tests.lorainit.init.methods.test_methods import evidence, weight

# Every method with its defaults, and the settings that change what the seed does.
CASES = [
    *((name, {}) for name in INITS),
    ("loram", {"basis": "random_orthogonal"}),
    ("loram", {"basis": "gaussian"}),
    ("lora_ga", {"direction": "random"}),
    ("hrp", {"complete": "random_orthonormal"}),
]
# The collectors need few rows and steps here.
SMALL = {"samples": 4, "preheat_rank": 8, "preheat_steps": 3}


def config_of(method, parameters):
    return INITS[method].model_validate({"method": method, **parameters})


def alike(one, other):
    """Equal up to rounding, and up to the signs of singular directions, which an SVD leaves open."""
    pairs = ((f.A.T @ f.A, f.B @ f.B.T, f.B @ f.A) for f in (one, other))
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*pairs, strict=True))


def start(config, seed):
    """The factors of one layer by a generator of this seed, whether the method would get this seed in a run or not."""
    W = weight()
    seen = replace(evidence(*W.shape), original=W + 0.1 * weight(seed=5))
    generator = torch.Generator().manual_seed(seed)
    return METHODS[config.method](W, seen, rank=8, scale=1.0, config=config, generator=generator)


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=str)
def test_another_seed_gives_other_factors_only_where_the_method_says_so(method, parameters):
    config = config_of(method, parameters)
    assert alike(start(config, 0), start(config, 1)) == (config.randomness != "factors")


@pytest.mark.parametrize("method", [m for m, kind in INITS.items() if kind.facts.needs not in ("none", "weight")])
def test_another_seed_gives_other_evidence_only_where_the_method_says_so(method, bases, rows):
    parameters = {name: value for name, value in SMALL.items() if name in INITS[method].model_fields}
    config = config_of(method, parameters)

    def collected(seed):
        context = make_context(bases["llama"], rows, {"method": method, **parameters}, batch_size=2, size=2)
        context.spec.seed = seed
        return collect(config, context)

    one, other = collected(0), collected(1)
    assert all(same_evidence(one[name], other[name]) for name in one) == (config.randomness != "evidence")


def same_evidence(one, other):
    """Whether two layers have the same evidence. Directions are compared by their projection, as they have no sign."""
    tensors = [
        (e.gradient, e.second_moment, e.directions is not None and e.directions.T @ e.directions, *(e.preheated or ()))
        for e in (one, other)
    ]
    pairs = [(a, b) for a, b in zip(*tensors, strict=True) if isinstance(a, torch.Tensor)]
    assert pairs, "nothing was collected"
    return one.rank == other.rank and all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)
