"""A base that runs out of memory, and what a run says of it."""

import torch
from safetensors.torch import load_file

from lorainit.config.events import Message, Metrics, Stage
from lorainit.model import base as base_module
from lorainit.model.forward.recompute import layers_of
from lorainit.model.layers.group import GroupedLinear
from lorainit.model.layers.layer import LoRALinear

CHECKPOINTING, TOKENS = "gradient_checkpointing", "tokens_per_pass"
PLENTY = 10_000


class Memory:
    """A base whose passes under adapters run out of memory beyond so many tokens.

    `limit`: of a pass with gradients, `recomputed` where layers are computed again; `looking`: of one without.
    `largest`: of the passes with gradients that fitted.
    """

    def __init__(self, monkeypatch, *, tokens=PLENTY, recomputed=None, looking=PLENTY):
        self.limit, self.recomputed, self.looking, self.largest = tokens, recomputed, looking, 0
        load_model = base_module.load_model

        def small(*args, **named):
            model = load_model(*args, **named)
            model.register_forward_pre_hook(lambda _, __, named: self.train(model, **named), with_kwargs=True)
            return model

        monkeypatch.setattr(base_module, "load_model", small)

    def train(self, model, **named):
        """What runs without an adapter is no training."""
        if any(isinstance(module, LoRALinear | GroupedLinear) for module in model.modules()):
            self.allocate(model, **named)

    def allocate(self, model, *, input_ids, **_named):
        learns, again = torch.is_grad_enabled(), any("forward" in vars(layer) for layer in layers_of(model))
        limit = self.recomputed if again and self.recomputed else self.limit
        if input_ids.numel() > (limit if learns else self.looking):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.largest = max(self.largest, input_ids.numel() * learns)


def after(step, memory, heard, **limits):
    """A listener that makes memory short after a step."""

    def shrink(event):
        heard.append(event)
        if isinstance(event, Metrics) and event.step == step:
            vars(memory).update(limits)

    return shrink


def until_export(memory, listener):
    """Memory is plenty again when the training is over."""

    def hear(event):
        listener(event)
        if isinstance(event, Stage) and event.stage == "exporting":
            memory.looking = PLENTY

    return hear


def told(events):
    kinds = ("oom_retry", "machine")
    return [e.data for e in events if isinstance(e, Message) and e.data["kind"] in kinds and "rows" not in e.data]


def adapter(done):
    return load_file(f"{done.adapter}/adapter_model.safetensors")


def close(one, two, *, atol=2e-6):
    return one.keys() == two.keys() and all(torch.allclose(one[n], two[n], atol=atol, rtol=1e-4) for n in one)
