"""The frozen base that one run, or a group of runs, trains on: opened once, and loaded when first needed."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorainit.config.errors import GroupMismatch
from lorainit.config.events import Message, OnEvent
from lorainit.config.inits import Quantization
from lorainit.config.spec import RunSpec
from lorainit.data.batches import Batch, Regime, any_length, make_batch, pad_id
from lorainit.data.dataset import Sample
from lorainit.model import memory
from lorainit.model.finite import require_finite
from lorainit.model.forward.head import is_plain
from lorainit.model.layers import experts
from lorainit.model.layers.quantize import require_library
from lorainit.model.layout import Layout, choose_layout
from lorainit.model.load import Location, load_model, load_tokenizer, locate_base
from lorainit.model.shard import explain_sharding, shard
from lorainit.model.sharded_load import load_shard
from lorainit.model.source.digest import cached_sha256, require_inspected, require_whole
from lorainit.model.source.examine import examine
from lorainit.model.source.vocabulary import require_rows
from lorainit.model.targets.four_bits import FourBits, choose_four_bits
from lorainit.model.targets.targets import describe
from lorainit.runtime import devices, settings
from lorainit.runtime.disk_cache import DiskCache
from lorainit.runtime.distributed.world import SINGLE_PROCESS, World
from lorainit.runtime.refusal import as_unsupported
from lorainit.runtime.settings import Setting


@dataclass
class Base:
    """A base model in the format and on the device of a run.

    `weights`: how many numbers the layers hold that can carry a LoRA.
    `sharded`: the reason why it is divided between the processes of `world`; "" = it is not. `layout`: how rows share
    a forward pass, known once it is loaded. `early_checks`: the result of the early export check for each layout of
    adapters. `four_bits`: which layers of a quantized base are in four bits.
    """

    spec: RunSpec
    location: Location
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    quantization: Quantization | None
    sha256: str
    weights: int
    world: World = SINGLE_PROCESS
    sharded: str = ""
    layout: Layout = field(default_factory=lambda: Layout("one by one", "it is not loaded", any_length))
    early_checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    four_bits: FourBits | None = None
    _model: nn.Module | None = field(default=None, repr=False)

    @property
    def model(self) -> nn.Module:
        """The loaded model; call `load` before."""
        assert self._model is not None
        return self._model

    @cached_property
    def pad(self) -> int:
        """The padding token's id."""
        return pad_id(self.tokenizer)

    def load(self, on_event: OnEvent) -> nn.Module:
        """Load the weights and choose the layout of rows, unless that is done already."""
        if self._model is None:
            try:
                self._load(on_event)
            except BaseException:
                self._model = None  # so that the next run of a group loads again and gets the same error
                raise
        return self.model

    def _load(self, on_event: OnEvent) -> None:
        self._model = self.load_copy()
        require_finite(self._model)
        if self.quantization:
            self._require_to_run()
            self._report_unquantized(on_event)
        experts.install(self._model)  # before sharding, because FSDP remembers the module of each weight
        if self.sharded:
            self.shard_copy(self._model)
            text = f"Each of {self.world.size} devices holds a part of the base: {self.sharded}"
            settings.record(Setting("base", "sharded", self.sharded))
            on_event(Message(message=text, data={"kind": "machine", "shard_base": True}))
        self.layout = choose_layout(self._model)
        is_plain(self._model)  # found out and kept now, because later hooks of initializations would see the trial pass
        why = self.layout.why or "no padding to compute, and attention inside each row only"
        settings.record(Setting("rows", self.layout.rows, why))
        verb = "go" if self.layout.rows == "one by one" else "are"
        data = {"kind": "machine", "rows": self.layout.rows}
        on_event(Message(message=f"Rows {verb} {self.layout.rows}: {why}", data=data))

    def _report_unquantized(self, on_event: OnEvent) -> None:
        if self.four_bits and self.four_bits.kept:
            facts = {"kind": "data", **self.four_bits.describe(self.dtype)}
            on_event(Message(message=self.four_bits.explain(), data=facts))

    @torch.no_grad()
    def _require_to_run(self) -> None:
        """Run two tokens, because some kernels read a layer's weight directly and fail on four bits."""
        with as_unsupported(f"The base model does not run with its layers in {self.quantization}"):
            self.model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device), use_cache=False)

    def load_copy(self, *, in_parts: bool = True) -> nn.Module:
        """Another copy of the base on the device; of a sharded base, this process's part (see `shard_copy`).

        Args:
            in_parts: False = a copy of a sharded base is whole and on the CPU until `shard_copy` divides it.
        """
        if self.sharded and in_parts:
            part = {"rank": self.world.rank, "size": self.world.size}
            return load_shard(self.location.folder, dtype=self.dtype, device=self.device, **part)
        return self.copy_on(torch.device("cpu") if self.sharded else self.device)

    def copy_on(self, device: torch.device) -> nn.Module:
        """Another whole copy of the base, on this device."""
        return load_model(self.location.folder, dtype=self.dtype, device=device, quantization=self.quantization)

    def list_devices_for_copy(self, *, tokens: int, factors: int) -> Iterator[torch.device]:
        """Devices with enough free memory for another copy of the base: its own device first, then the CPU.

        An iterator, so that free memory is measured just before each device is used.

        Args:
            tokens, factors: as for `memory.copy_bytes`.
        """
        wanted = memory.copy_bytes(self.model, tokens=tokens, factors=factors)
        for device in self._devices():
            # Not on another device with four bits, because weights may be rounded differently there.
            if (device == self.device or not self.quantization) and _has_free(wanted, device):
                yield device

    def has_room_beside(self, *, tokens: int, factors: int) -> bool:
        """Whether there is memory for a copy of `load_copy` while this one stays loaded."""
        device = torch.device("cpu") if self.sharded else self.device
        return _has_free(memory.copy_bytes(self.model, tokens=tokens, factors=factors), device)

    def _devices(self) -> list[torch.device]:
        cpu = torch.device("cpu")
        return [cpu] if self.sharded or self.device == cpu else [self.device, cpu]

    def shard_copy(self, model: nn.Module, whole: Collection[nn.Parameter] = ()) -> None:
        """Divide a model that `load_copy` has made, if this base is sharded."""
        if self.sharded:
            shard(model, self.device, world=self.world, whole=whole)

    @property
    def packs(self) -> bool:
        """Whether rows are packed into one sequence."""
        return self.layout.rows == "packed"

    @property
    def regime(self) -> Regime:
        """Which rows may share a pass."""
        return self.layout.regime

    @property
    def make_batch(self) -> Callable[[Sequence[Sample]], Batch]:
        """Rows to a batch on the model's device."""
        return partial(make_batch, packed=self.packs, pad=self.pad, device=self.device)

    def release(self) -> None:
        """Drop the weights, so that their memory can be freed."""
        self._model = None

    def require_same(self, spec: RunSpec) -> None:
        """Raise `GroupMismatch` where `spec` cannot share this base's forward pass."""
        for name, ours, theirs in (
            ("model", self.spec.model.source, spec.model.source),
            ("precision", self.dtype, self._dtype_of(spec)),
            ("lora.quantization", self.quantization, spec.lora.quantization),
            ("deterministic", self.spec.deterministic, spec.deterministic),
        ):
            if ours != theirs:
                raise GroupMismatch(
                    f"This run has {name} {theirs!r} and the one it is grouped with {ours!r}: they cannot share a"
                    " forward pass.",
                    param=name,
                )

    def _dtype_of(self, spec: RunSpec) -> torch.dtype:
        return devices.dtype_of(devices.resolve_precision(spec.training, self.device)[0].precision)

    def require_packing(self) -> None:
        """Raise `GroupMismatch` where several adapters cannot share a forward pass."""
        if not self.packs:
            raise GroupMismatch("This base model cannot train on packed rows, which grouped runs need.", param="member")


def _has_free(wanted: float, device: torch.device) -> bool:
    free = devices.free_bytes(device)
    return free is None or wanted <= free


def open_disk_cache(spec: RunSpec, kind: str, on_event: OnEvent) -> DiskCache:
    """The cache of one of `disk_cache.KINDS`; switched off for a run without a cache folder."""
    return DiskCache(Path(spec.cache or "") / kind, spec.cache_limit_bytes if spec.cache else 0, on_event)


def open_base(spec: RunSpec, out: Path, on_event: OnEvent, *, world: World = SINGLE_PROCESS) -> Base:
    """Find the base and check it without loading its weights.

    Args:
        out: a GGUF base is converted into this folder if the spec names no cache.

    Raises:
        UnsupportedModel: there is no base, it cannot be trained, or this machine cannot run it as asked.
    """
    if spec.lora.quantization:
        require_library()
    device = devices.pick_device()
    dtype = devices.dtype_of(devices.resolve_precision(spec.training, device)[0].precision)
    location = locate_base(spec.model.source, cache=Path(spec.cache) if spec.cache else out / "base")
    skeleton = examine(location.folder)
    tokenizer = load_tokenizer(location.folder)
    require_rows(tokenizer, skeleton)
    # Only rank 0 computes the digest, because that reads all weights.
    digest = cached_sha256(location.folder, open_disk_cache(spec, "bases", on_event)) if world.is_rank0 else ""
    digest = world.broadcast_digest(digest, device)
    require_whole(location.folder, digest)
    require_inspected(spec.model, digest)
    sharded = explain_sharding(spec, location.folder, world=world, dtype=dtype, device=device)
    world = replace(world, in_step=bool(sharded))
    held = choose_four_bits(skeleton) if spec.lora.quantization else None
    experts.install(skeleton)
    weights = spec.model.weights or sum(kind.weights for kind in describe(skeleton)[0])
    base = Base(spec, location, tokenizer, dtype, device, spec.lora.quantization, digest, weights, world, sharded)
    return replace(base, four_bits=held)
