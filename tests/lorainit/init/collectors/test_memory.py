"""Evidence that does not fit into memory is refused before it is collected."""

import pytest
import torch

from lorainit.config.errors import OutOfMemory
from lorainit.config.events import Message
from lorainit.init.collectors.collect import collect
from lorainit.runtime import devices
from tests.lorainit.contexts import make_context
from tests.zoo.bases import make

LOOKING = ["corda", "eva", "hrp", "lora_ga", "lora_one"]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return make("mixtral", tmp_path_factory.mktemp("room") / "mixtral")


@pytest.mark.parametrize("method", LOOKING)
def test_evidence_that_takes_more_than_is_free_is_refused_before_it_is_collected(mixture, rows, monkeypatch, method):
    monkeypatch.setattr(devices, "free_bytes", lambda device: 1000)
    events = []
    context = make_context(mixture, rows, {"method": method}, install=True, on_event=events.append)
    with pytest.raises(OutOfMemory, match=rf"^{method}'s .* are free. 16 of the 24 adapted matrices are experts'"):
        collect(context.lora.method, context)
    assert not [event for event in events if not isinstance(event, Message)]  # no pass has been counted


@pytest.mark.parametrize(("method", "kept"), [("corda", "second_moment"), ("lora_ga", "gradient")])
def test_what_is_counted_is_what_is_kept(mixture, rows, method, kept):
    events = []
    context = make_context(mixture, rows, {"method": method}, install=True, on_event=events.append)
    found = [getattr(one, kept) for one in collect(context.lora.method, context).values() if not one.starved]
    assert len(found) == len(context.targets)
    storages = {tensor.untyped_storage().data_ptr(): tensor.numel() * 4 for tensor in found}
    messages = [event.data for event in events if isinstance(event, Message)]
    (told,) = [data["evidence_bytes"] for data in messages if "evidence_bytes" in data]
    assert told == sum(storages.values())


def test_a_device_that_does_not_say_what_is_free_is_no_hindrance(mixture, rows, monkeypatch):
    monkeypatch.setattr(devices, "free_bytes", lambda device: None)
    context = make_context(mixture, rows, {"method": "corda"}, wanted="attention", install=True)
    moments = [one.second_moment for one in collect(context.lora.method, context).values()]
    assert all(torch.isfinite(C).all() for C in moments)
