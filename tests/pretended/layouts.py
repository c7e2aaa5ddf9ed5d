"""The layout of rows is tried once for runs on like bases: on the pretended device the trial is half of a tiny run.

For tests of what comes after it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def tried_once() -> Iterator[None]:
    """Runs in here keep the layout of the first one on a base of the same class, layers and precision."""
    from lorainit.model import base  # read only when the engine is to take the device for CUDA

    with mock.patch.object(base, "choose_layout", _remembered(base.choose_layout)):
        yield


def _remembered(choose: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known = dict[object, tuple[Any, str]]()

    def choose_once(model: Any) -> Any:
        key = (type(model), model.config.num_hidden_layers, model.dtype)
        if key not in known:
            known[key] = choose(model), model.config._attn_implementation
        layout, attention = known[key]
        model.set_attn_implementation(attention)
        return layout

    return choose_once
