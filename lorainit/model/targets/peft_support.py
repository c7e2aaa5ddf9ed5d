"""Finds out on which layers of an architecture stock PEFT can put a LoRA, by a trial with fake tensors.

Fake tensors have shapes but no numbers, and only one layer of each kind is tried, so a base of 700 billion parameters
takes seconds and almost no memory. The trial checks that PEFT can adapt a layer, loads the adapter again under the same
name, and that the adapter gets a gradient. Some do not: Mamba's kernels read weights directly instead of calling the
layer, and a router's output is not a tensor. Whether an adapter *computes* what was trained is for the export check.
PEFT is imported only when it is needed, because that takes more than a second.
"""

import copy
import json
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from linecache import getline
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoModelForCausalLM

from lorainit.config.errors import UnsupportedModel
from lorainit.model.targets.like_layers import find_counterpart, find_like_layers, skip
from lorainit.model.targets.names import pattern_of
from lorainit.runtime.machine_errors import is_machine_failure

TOKENS = 8
# CPU time for one trial. It is limited because a fake operation takes 0.3 ms and some layers loop over tokens.
MAX_SECONDS = 60.0
READ = "its weight is read directly, without a call of the layer, so a LoRA would have no effect"
UNUSED = "text does not pass through it"
NO_TENSOR = "it returns something else than one tensor, which PEFT cannot add to"
UNHEARD = "an adapter there does not change the model's output"
RENAMED = "PEFT reads its adapter under another name than the layer's, and does not find it again"
# Uses of a weight that do not compute with it, so they do not count as reading it.
_HARMLESS = re.compile(r"\.(dtype|device|shape|ndim|size\()")


# --- names as PEFT reads them ---------------------------------------------------------------------


def find_rewritten(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of these layers that PEFT, with transformers 5, mistakes for experts of an older file format.

    PEFT looks only at the last part of a name: it turns `mlp.gate_proj` of a dense layer or of a shared expert into
    `gate_up_proj` of all experts, and does not load the trained factors. Therefore such a layer's weight is exported
    as one of the `target_parameters`: the tensors have the same names, and PEFT does not rewrite these.
    """
    if not hasattr(model, "config"):
        return []
    leaves = {name.rpartition(".")[2] for name in names}
    taken = {leaf for leaf in leaves if _is_rewritten(model, leaf)}
    return [name for name in names if name.rpartition(".")[2] in taken]


def _is_rewritten(model: nn.Module, leaf: str) -> bool:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # "cannot convert without also targeting …", so PEFT wanted to rewrite the name
        return True
    return leaf not in (config.target_modules or ())


def as_peft_names(model: nn.Module, names: Sequence[str]) -> dict[str, list[str]]:
    """`target_modules` and `target_parameters` of an adapter on these layers (full names)."""
    apart = set(find_rewritten(model, names))
    return {
        "target_modules": [name for name in names if name not in apart],
        "target_parameters": [f"{name}.weight" for name in names if name in apart],
    }


# --- the trial -------------------------------------------------------------------------------------


def find_refusals(model: Any, names: Sequence[str]) -> dict[str, str]:
    """Why some of these layers cannot carry a LoRA that stock PEFT reads; layers without an entry can.

    Args:
        model: a causal language model of transformers, with or without weights; only its configuration is used.
        names: full names of linear layers.

    Raises:
        UnsupportedModel: the model does not run on a few tokens of text at all, or takes `MAX_SECONDS` for it.
    """
    config = copy.deepcopy(model.config)
    for trace in ("quantization_config", "_is_quantized", "_pre_quantization_dtype"):  # Jamba reads the second
        vars(config).pop(trace, None)
    config._attn_implementation = None  # transformers' default, because our attention caches masks for later passes
    text = json.dumps([type(config).__name__, config.to_dict()], sort_keys=True, default=str)
    return dict(_refusals(_Key(text, config, type(model)), tuple(names)))


class _Key:
    """A configuration that can be a key of the cache: equal if its text and the model's class are equal."""

    def __init__(self, text: str, config: Any, kind: type) -> None:
        self.text, self.config, self.kind = text, config, kind

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and (self.text, self.kind) == (other.text, other.kind)

    def __hash__(self) -> int:
        return hash(self.text)


@lru_cache(maxsize=32)
def _refusals(key: _Key, names: tuple[str, ...]) -> Mapping[str, str]:
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it would log errors that are caught here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.disabled = True
        try:
            return _try(key.config, names)
        finally:
            log.disabled = False


def _try(config: Any, names: Sequence[str]) -> dict[str, str]:
    """Try one of the layers that are alike; its result counts for all of them."""
    alike = find_like_layers(_built(config))
    spokesman = {name: find_counterpart(name, alike) for name in names}
    end = time.thread_time() + MAX_SECONDS
    found = _try_each(config, list(dict.fromkeys(spokesman.values())), end)
    return {name: found[one] for name, one in spokesman.items() if one in found}


def _try_each(config: Any, names: Sequence[str], end: float) -> dict[str, str]:
    """Try these layers together and, if that fails, one kind after the other, to find the kinds at fault.

    Args:
        end: the trial ends when the thread's CPU time reaches this value.
    """
    try:
        found = _observe(config, names, end)
    except Exception as error:
        if isinstance(error, UnsupportedModel) or is_machine_failure(error):
            raise
        text = f"The architecture of the base model cannot be tried out: {' '.join(str(error).split())[:400]}"
        raise UnsupportedModel(text, param="model") from error
    left = [name for name in names if name not in found]
    kinds = dict[str, list[str]]()
    for name in left:
        kinds.setdefault(pattern_of(name), []).append(name)
    try:
        return found | _adapt(config, left, end)
    except Exception as error:
        if isinstance(error, UnsupportedModel) or is_machine_failure(error):
            raise
        for group in kinds.values():
            try:
                found |= _adapt(config, group, end)
            except Exception as its_own:
                if isinstance(its_own, UnsupportedModel) or is_machine_failure(its_own):
                    raise
                found |= dict.fromkeys(group, _because(its_own))
    return found


def _because(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (
        f"stock PEFT refuses it: {text[:400]}" if isinstance(error, ValueError) else f"with a LoRA there: {text[:400]}"
    )


def _built(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)


def _skeleton(config: Any) -> Any:
    model = _built(config)
    skip(model, find_like_layers(model))
    if hasattr(model, "set_experts_implementation"):
        with suppress(ValueError):  # no experts here, or experts of their own
            model.set_experts_implementation("batched_mm")  # because the others read which tokens go to which expert
    for name, module in model.named_modules():
        own_way = name.endswith("experts") and not hasattr(module, "_apply_gate")
        if own_way and not any(isinstance(child, nn.Linear) for child in module.modules()):
            module.forward = _as_it_came  # LongCat-Flash reads that too, and its experts cannot be adapted anyway
        # Some rotary embeddings read the length of the rows from a tensor, and fake tensors have no numbers.
        if isinstance(kind := getattr(module, "rope_type", None), str | dict):
            module.rope_type = "default" if isinstance(kind, str) else dict.fromkeys(kind, "default")
    return model.requires_grad_(requires_grad=False)


def _as_it_came(hidden: Tensor, *_others: Any, **_more: Any) -> Tensor:
    return hidden


class _TimedFakeTensors(FakeTensorMode):
    """Checks the time before each operation, because a layer cannot be interrupted in another way."""

    def __init__(self, end: float) -> None:
        super().__init__(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        self.end = end

    def __torch_dispatch__(self, *args: Any, **options: Any) -> Any:
        if time.thread_time() > self.end:
            raise UnsupportedModel(
                f"The architecture of the base model cannot be tried out: a few tokens take more than"
                f" {MAX_SECONDS:.0f} s of a processor.",
                param="model",
            )
        return super().__torch_dispatch__(*args, **options)


@contextmanager
def _in_fake_tensors(model: Any, end: float) -> Iterator[None]:
    """Make a model on the meta device run as if it were on a CPU, while the context lasts."""
    with _TimedFakeTensors(end):
        model.to_empty(device="cpu")
        yield


def _say(model: Any) -> Tensor:
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _observe(config: Any, names: Sequence[str], end: float) -> dict[str, str]:
    """Watch how two passes use these layers. One is in training mode, where some kernels read weights directly, and one
    in evaluation mode, where RWKV changes some weights."""
    seen, read = dict[str, bool](), set[str]()
    model = _skeleton(config)
    with _in_fake_tensors(model, end):
        for name in names:
            layer = model.get_submodule(name)
            layer.register_forward_hook(_note(seen, name))
            _watch(layer, name, read)
        for training in (True, False):
            _say(model.train(training))
    found = dict[str, str]()
    for name in names:
        if name in read:
            found[name] = READ
        elif name not in seen:
            found[name] = UNUSED
        elif not seen[name]:
            found[name] = NO_TENSOR
    return found


def _note(seen: dict[str, bool], name: str) -> Callable[..., None]:
    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen[name] = isinstance(output, Tensor)

    return note


def _watch(layer: nn.Module, name: str, read: set[str]) -> None:
    """Add the layer's name to `read` if code outside of it reads its weight, by a subclass that notes each access."""
    plain = type(layer).__getattr__

    def tell(self: nn.Module, attribute: str) -> Any:
        if attribute in ("weight", "bias") and not _is_harmless(sys._getframe(1), self, attribute):
            read.add(name)
        return plain(self, attribute)

    layer.__class__ = type(type(layer).__name__, (type(layer),), {"__getattr__": tell})


def _is_harmless(frame: FrameType, layer: nn.Module, attribute: str) -> bool:
    """Whether the layer itself reads its weight, or the line only uses the weight's dtype or device."""
    if frame.f_locals.get("self") is layer or "/torch/" in frame.f_code.co_filename:
        return True
    line = getline(frame.f_code.co_filename, frame.f_lineno)
    uses = re.findall(rf"\.{attribute}\b(.{{0,8}})", line)
    return attribute == "bias" or (bool(uses) and all(_HARMLESS.match(use) for use in uses))


def _adapt(config: Any, names: Sequence[str], end: float) -> dict[str, str]:
    """Put PEFT's LoRA on these layers, run forward and backward, and return the layers without a gradient."""
    from peft import LoraConfig, get_peft_model

    if not names:
        return {}
    model = _skeleton(config)
    options = LoraConfig(task_type="CAUSAL_LM", r=1, **as_peft_names(model, names))  # type: ignore[arg-type]
    adapted: Any = get_peft_model(model, options).eval()
    if lost := _lost(adapted, names):
        return lost | _adapt(config, [name for name in names if name not in lost], end)
    with _in_fake_tensors(adapted, end):
        logits = _say(adapted)
        if logits.requires_grad:
            logits.float().sum().backward()
        heard = {n for n, p in adapted.named_parameters() if ".lora_" in n and p.grad is not None}
    missing = [name for name in names if not _factors(name) <= heard]
    return dict.fromkeys(missing, UNHEARD)


def _lost(adapted: Any, names: Sequence[str]) -> dict[str, str]:
    """Layers whose factors PEFT does not load from what it has saved itself, because it changes some names.

    It applies transformers' rules for the names in older files to adapters too (Laguna's `shared_experts`).
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    read: Any = set_peft_model_state_dict(adapted, saved)
    missing = set(read.missing_keys)
    return {name: RENAMED for name in names if _factors(name) & missing}


def _factors(name: str) -> set[str]:
    """PEFT's names for the factors of a layer."""
    return {f"base_model.model.{name}.{factor}.default.weight" for factor in ("lora_A", "lora_B")}
