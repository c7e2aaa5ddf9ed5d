"""The frozen base that a run, or several runs together, train on: opened once, loaded when first needed."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from lorainit.model.targets.four_bits import FourBits, four_bits
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
    `sharded`: why it is divided between the processes of `world`; "" = it is not. `layout`: how rows share
    its passes, once it is loaded. `early_checks`: of each shape of an adapter, how it was shown that stock PEFT reads
    it. `four_bits`: of a quantized base, which layers are.
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
        """The loaded model; `load` comes first."""
        assert self._model is not None
        return self._model

    @property
    def pad(self) -> int:
        """The padding token's id."""
        return pad_id(self.tokenizer)

    def load(self, on_event: OnEvent) -> nn.Module:
        """Load the weights, if nobody has, and choose the attention."""
        if self._model is None:
            try:
                self._load(on_event)
            except BaseException:
                self._model = None  # the next run of a group learns the same, and not something else
                raise
        return self.model

    def _load(self, on_event: OnEvent) -> None:
        self._model = self.fresh()
        require_finite(self._model)
        if self.quantization:
            self._require_to_run()
            self._report_unquantized(on_event)
        experts.install(self._model)  # before the base is divided, which remembers where each weight stands
        if self.sharded:
            self.shard_copy(self._model)
            text = f"Each of {self.world.size} devices holds a part of the base: {self.sharded}"
            settings.record(Setting("base", "sharded", self.sharded))
            on_event(Message(message=text, data={"kind": "machine", "shard_base": True}))
        self.layout = choose_layout(self._model)
        is_plain(self._model)  # asked now, while nobody watches its layers
        why = self.layout.why or "no padding to compute, and attention inside each row only"
        settings.record(Setting("rows", self.layout.rows, why))
        verb = "go" if self.layout.rows == "one by one" else "are"
        data = {"kind": "machine", "rows": self.layout.rows}
        on_event(Message(message=f"Rows {verb} {self.layout.rows}: {why}", data=data))

    def _report_unquantized(self, on_event: OnEvent) -> None:
        if self.four_bits and self.four_bits.kept:
            facts = {"kind": "data", **self.four_bits.statement(self.dtype)}
            on_event(Message(message=self.four_bits.sentence(), data=facts))

    @torch.no_grad()
    def _require_to_run(self) -> None:
        """Some kernels read a layer's weight past the layer, and know nothing of weights in four bits."""
        with as_unsupported(f"The base model does not run with its layers in {self.quantization}"):
            self.model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device), use_cache=False)

    def fresh(self, *, in_parts: bool = True) -> nn.Module:
        """Another copy of the base: on the device; if it is to be divided with `shard_copy`, this process's part of it.

        Args:
            in_parts: False = one that is to be divided is on the CPU, and whole until then.
        """
        if self.sharded and in_parts:
            part = {"rank": self.world.rank, "size": self.world.size}
            return load_shard(self.location.folder, dtype=self.dtype, device=self.device, **part)
        return self.copy_on(torch.device("cpu") if self.sharded else self.device)

    def copy_on(self, device: torch.device) -> nn.Module:
        """Another whole copy of the base, on this device."""
        return load_model(self.location.folder, dtype=self.dtype, device=device, quantization=self.quantization)

    def devices_for_copy(self, *, tokens: int, factors: int) -> Iterator[torch.device]:
        """Where another copy fits while the first one lies there: on the device, then on the CPU.

        What is free is asked when the place is asked for.

        Args:
            tokens, factors: as for `memory.copy_bytes`.
        """
        wanted = memory.copy_bytes(self.model, tokens=tokens, factors=factors)
        for device in self._devices():
            # Four bits may be rounded otherwise on another device.
            if (device == self.device or not self.quantization) and _has_free(wanted, device):
                yield device

    def has_room_beside(self, *, tokens: int, factors: int) -> bool:
        """Whether a `fresh` copy fits while this one lies there."""
        device = torch.device("cpu") if self.sharded else self.device
        return _has_free(memory.copy_bytes(self.model, tokens=tokens, factors=factors), device)

    def _devices(self) -> list[torch.device]:
        cpu = torch.device("cpu")
        return [cpu] if self.sharded or self.device == cpu else [self.device, cpu]

    def shard_copy(self, model: nn.Module, whole: Collection[nn.Parameter] = ()) -> None:
        """Divide a model that `fresh` has made, if this base is divided."""
        if self.sharded:
            shard(model, self.device, world=self.world, whole=whole)

    @property
    def packs(self) -> bool:
        """Whether it trains on packed rows."""
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
        """Let the weights go."""
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
    """What earlier runs found out, one of `open_disk_cache.KINDS`; a run without a cache folder keeps nothing."""
    return DiskCache(Path(spec.cache or "") / kind, spec.cache_limit_bytes if spec.cache else 0, on_event)


def open_base(spec: RunSpec, out: Path, on_event: OnEvent, *, world: World = SINGLE_PROCESS) -> Base:
    """Find the base and what can be known of it without its weights.

    Args:
        out: where a GGUF base is converted to when the spec names no cache.

    Raises:
        UnsupportedModel: it is not there or not one that can be trained, or this machine cannot run it as asked.
    """
    if spec.lora.quantization:
        require_library()
    device = devices.pick_device()
    dtype = devices.dtype_of(devices.resolve_precision(spec.training, device)[0].precision)
    location = locate_base(spec.model.source, cache=Path(spec.cache) if spec.cache else out / "base")
    skeleton = examine(location.folder)
    tokenizer = load_tokenizer(location.folder)
    require_rows(tokenizer, skeleton)
    # The leading process alone reads all of it for that.
    digest = cached_sha256(location.folder, open_disk_cache(spec, "bases", on_event)) if world.is_rank0 else ""
    digest = world.broadcast_digest(digest, device)
    require_whole(location.folder, digest)
    require_inspected(spec.model, digest)
    sharded = explain_sharding(spec, location.folder, world=world, dtype=dtype, device=device)
    world = replace(world, in_step=bool(sharded))
    held = four_bits(skeleton) if spec.lora.quantization else None
    experts.install(skeleton)
    weights = spec.model.weights or sum(kind.weights for kind in describe(skeleton)[0])
    base = Base(spec, location, tokenizer, dtype, device, spec.lora.quantization, digest, weights, world, sharded)
    return replace(base, four_bits=held)
