"""Finds layers of a model that are alike, so that a trial needs to run only one of each kind.

A model of 61 layers has three or four kinds of them. In a trial the other layers return their input, which saves time.
"""

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

# Attributes with the index of a layer in the model. They differ between layers that are alike, so they are ignored.
_PLACE = re.compile(r"(^|_)(idx|index|layer_id|block_id)$")


def find_like_layers(model: Any) -> dict[str, str]:
    """Full names of layers that are like an earlier one, each with the name of the earlier one.

    Layers are alike if their modules have the same classes, plain attributes and shapes, and the same entries in the
    configuration's lists. The first and the last layer count as different from all others, because some models treat
    them differently.
    """
    found, done = dict[str, str](), list[str]()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in done):
            continue
        done.append(name)
        first = dict[Hashable, str]()
        lists = _lists(model, len(module))
        for index, layer in list(enumerate(module))[1:-1]:
            kind = (*(repr(values[index]) for values in lists), *_looks(layer, index))
            path = f"{name}.{index}"
            if (other := first.setdefault(kind, path)) != path:
                found[path] = other
    return found


def _lists(model: Any, length: int) -> list[Sequence[Any]]:
    values = vars(model.config.get_text_config()).values() if hasattr(model, "config") else ()
    return [value for value in values if isinstance(value, list | tuple) and len(value) == length]


def _looks(layer: nn.Module, index: int) -> Iterator[Hashable]:
    for name, module in layer.named_modules():
        yield name, type(module)
        for attribute, value in vars(module).items():
            if _PLACE.search(attribute) and value == index:
                continue
            if value is None or isinstance(value, bool | int | float | str | list | tuple):
                yield attribute, repr(value)
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        yield name, tensor.shape, tensor.dtype


def find_counterpart(name: str, alike: Mapping[str, str]) -> str:
    """The name of the same module in the earlier layer that its layer is like; the name itself if there is none."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if other := alike.get(".".join(parts[:end])):
            return ".".join([other, *parts[end:]])
    return name


def skip(model: nn.Module, alike: Mapping[str, str]) -> None:
    """Make layers that are like an earlier one return their input, if the earlier one's output has the same shape."""
    answers = dict[str, Any]()
    for path in set(alike.values()):
        _remember(model.get_submodule(path), path, answers)
    for path, other in alike.items():
        _hand_on(model.get_submodule(path), other, answers)


def _remember(layer: Any, path: str, answers: dict[str, Any]) -> None:
    forward = layer.forward

    def remember(*args: Any, **options: Any) -> Any:
        answers[path] = forward(*args, **options)
        return answers[path]

    layer.forward = remember


def _hand_on(layer: Any, other: str, answers: dict[str, Any]) -> None:
    forward = layer.forward

    def hand_on(*args: Any, **options: Any) -> Any:
        given, answer = args[0] if args else options.get("hidden_states"), answers.get(other)
        hidden = answer[0] if isinstance(answer, tuple) and answer else answer
        if not isinstance(given, Tensor) or not isinstance(hidden, Tensor):
            return forward(*args, **options)
        if (given.shape, given.dtype) != (hidden.shape, hidden.dtype):
            return forward(*args, **options)
        return (given, *answer[1:]) if isinstance(answer, tuple) else given

    layer.forward = hand_on
