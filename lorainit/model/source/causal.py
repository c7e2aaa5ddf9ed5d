"""Tests whether an architecture is causal: a later token must not change the model's output for earlier ones.

The test runs a small copy of the model: the same configuration with few heads, narrow matrices, random weights and just
enough layers to have every kind. The copy is sufficient because attention masks, convolutions and recurrences are
defined by code and configuration, not by weights. It takes a second for a base of any size (docs/decisions/0029).
"""

import math
import re
import time
from collections.abc import Iterator
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lorainit.config.errors import UnsupportedModel
from lorainit.runtime.machine_errors import is_machine_failure

MAX_PARAMETERS = 300_000_000  # of a copy: 1.2 GB in float32
LAYERS = 12  # enough to have every kind of layer, because kinds repeat after six (Gemma 3) or eight layers (Jamba)
MAX_SECONDS = 30.0  # CPU time for finding a size that runs; for most models the first one does
TOKENS = 24
CUTS = (1, 12, 23)  # from which position the rows differ: after the first token, in the middle, at the last token
# The largest allowed change relative to the largest logit. Causal models give exactly 0.0, encoders 0.15 to 0.7.
LEAK = 1e-3
_VOCABULARY = 256
_SLIM = 32  # inner width of MLPs and experts
_CHUNK = 16  # chunk of state-space layers, short so that a row of the test crosses the border of a chunk
_NO_HEADS = 16  # widths are divided by up to this if the configuration names no heads

# Names of configuration entries. Heads and widths are divided by the same factor, because they must agree: hidden size
# = heads × head size, and similarly for the inner sizes of state-space layers.
_HEADS = re.compile(r"(^|_)heads$|(^|_)n(um)?_head$")
_WIDTH = re.compile(r"(^|_)(hidden|embd|embedding|model|width|ssm|inner|size|dim)(_|$)")
_FREE = re.compile(r"intermediate|ffn|inner|d_ff")
_TOKEN = re.compile(r"token_(id|index)$")
_FIXED = re.compile(
    r"head_dim|d_head|rotary|rope|position|kernel|conv|state|window|chunk|patch|block|image|group|rank|type|per_head|"
    r"per_layer|_dt_|max_|seq|context|tok|beam|audio|cache|router|layers?(_|$)|interval"
)


def require_causal(config: Any, skeleton: nn.Module) -> None:
    """Raise `UnsupportedModel` unless a model of this configuration is causal.

    Args:
        config: a configuration of a class that `AutoModelForCausalLM` knows; it is not changed.
        skeleton: the model that transformers builds from it, on any device.
    """
    model = _narrow_copy(config, {type(module) for module in skeleton.modules()})
    ids, cuts = _rows(model.config), CUTS
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    except Exception as error:
        if is_machine_failure(error):
            raise
        raise _untried(config, error) from error
    if logits.shape[:2] != ids.shape or logits.ndim != 3:
        raise _not_causal(config, f"it answers {tuple(logits.shape)} to {tuple(ids.shape)} tokens")
    if not logits.isfinite().all():
        raise _untried(config, ValueError("small random weights make of it numbers that are not finite"))
    if not logits.any():
        raise _untried(config, ValueError("small random weights make of it nothing but zeros"))
    leak = max(_change(logits, row, cut) for row, cut in enumerate(cuts, 1))
    if not leak <= LEAK:
        raise _not_causal(config, "what it says of a token changes with the tokens behind it, as in an encoder")


def _rows(config: Any) -> Tensor:
    """The same row several times, each with other tokens from one of `CUTS` on; special tokens are not used."""
    special = set(_token_ids(config.to_dict()))
    plain = torch.tensor([n for n in range(1, _least_vocabulary(config)) if n not in special])
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, len(plain), (1, TOKENS), generator=generator).repeat(1 + len(CUTS), 1)
    for row, cut in enumerate(CUTS, 1):
        places[row, cut:] += max(1, len(plain) // 2)
    return plain[places % len(plain)]


def _change(logits: Tensor, row: int, cut: int) -> float:
    """How much the logits before `cut` differ from the first row's, relative to the largest."""
    return float((logits[row, :cut] - logits[0, :cut]).abs().max() / logits.abs().max())


# --- the copy ------------------------------------------------------------------------------------


def _narrow_copy(config: Any, kinds: set[type]) -> nn.Module:
    """The narrowest copy of the model that can be built and run, in evaluation mode.

    Args:
        kinds: the classes of the model's modules; the copy must have all of them.
    """
    problem: Exception = ValueError("it is too wide to be tried")
    end = time.process_time() + MAX_SECONDS
    for factor, shallow, slim in _shapes(config):
        try:
            narrow = type(config).from_dict(_narrowed(config, factor, shallow=shallow, slim=slim))
            with torch.device("meta"):
                shape = AutoModelForCausalLM.from_config(narrow, trust_remote_code=False)
            small = sum(parameter.numel() for parameter in shape.parameters()) <= MAX_PARAMETERS
            if small and {type(module) for module in shape.modules()} == kinds:
                return _filled(narrow)
        except Exception as error:  # a narrowed configuration may be inconsistent, which fails in many ways
            if is_machine_failure(error):
                raise
            problem = error
        if time.process_time() > end:
            break
    raise _untried(config, problem)


def _filled(config: Any) -> nn.Module:
    """A model with random matrices. Set explicitly, because some architectures start with zeros, which show nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
        model.config._experts_implementation = "eager"  # because the faster ones need widths of whole blocks
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            model.eval()(input_ids=_rows(config)[:1], use_cache=False)
    return cast(nn.Module, model)


def _shapes(config: Any) -> Iterator[tuple[int, bool, bool]]:
    """The sizes to try, smallest first: (divisor of heads and widths, only the first layers, small inner widths)."""
    heads = list(_head_counts(config.to_dict()))
    common, largest = (math.gcd(*heads), max(heads)) if heads else (_NO_HEADS, _NO_HEADS)
    divisors = [n for n in range(largest, 0, -1) if common % n == 0 or largest % n == 0]
    return product(divisors, (True, False), (True, False))


def _head_counts(values: dict[str, Any]) -> Iterator[int]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _head_counts(value)
        elif type(value) is int and value > 1 and _HEADS.search(name) and "key_value" not in name and "kv" not in name:
            yield value


def _narrowed(config: Any, factor: int, *, shallow: bool, slim: bool) -> dict[str, Any]:
    """The configuration with heads and widths divided by `factor`, few tokens, and perhaps few layers."""
    layers = config.get_text_config().num_hidden_layers

    def narrowed(values: dict[str, Any]) -> dict[str, Any]:
        return {name: smaller(name, value) for name, value in values.items()}

    def smaller(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return narrowed(value) if name.endswith("config") else value
        if isinstance(value, list):
            value = value[:LAYERS] if shallow and len(value) == layers else value
            return [_smaller(name, item, factor, slim=slim) for item in value]
        if shallow and value == layers and "layers" in name.replace("n_layer", "layers"):
            return min(value, LAYERS)
        return _smaller(name, value, factor, slim=slim)

    return narrowed(config.to_dict())


def _smaller(name: str, value: Any, factor: int, *, slim: bool) -> Any:
    if type(value) is not int:
        return value
    if "vocab_size" in name and "type" not in name:
        return min(value, _VOCABULARY)
    if name in ("chunk_size", "mamba_chunk_size"):
        return min(value, _CHUNK)
    if _TOKEN.search(name):
        return 0 if value >= _VOCABULARY else value
    if _HEADS.search(name):
        return max(1, value // factor)
    if value < 32 or _FIXED.search(name):
        return value
    if _FREE.search(name):
        return _SLIM if slim else 8 * math.ceil(value / factor / 8)
    return value // factor if _WIDTH.search(name) and value % factor == 0 else value


def _token_ids(values: dict[str, Any]) -> Iterator[int]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _token_ids(value)
        elif type(value) is int and _TOKEN.search(name):
            yield value


def _least_vocabulary(config: Any) -> int:
    found = config.get_text_config().vocab_size
    return min(found, _VOCABULARY) if isinstance(found, int) else _VOCABULARY


# --- refusals ------------------------------------------------------------------------------------


def _not_causal(config: Any, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"The base model ({config.model_type}) is not a causal language model: {why}.", param="model"
    )


def _untried(config: Any, error: Exception) -> UnsupportedModel:
    words = " ".join(str(error).split())[:300]
    return UnsupportedModel(
        f"Whether the base model ({config.model_type}) is causal cannot be found out, so it is not trained: {words}",
        param="model",
    )
