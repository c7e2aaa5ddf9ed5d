"""The device `pretend`: tensors that say they lie there and hold their numbers on the CPU, by torch's PrivateUse1.

Every operation is checked by `rules` and done on the CPU. Counted: launches of kernels, how often the host would have
waited, bytes that cross between host and device (`Tally`), and the bytes that lie there (`Memory`), of which there may
be a limit.
"""

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyDeviceGuard, _setup_privateuseone_for_python_backend

from tests.pretended import flash, rules, waits

NAME = "pretend"
# Nothing is computed for these.
NO_KERNEL = {"aten::_local_scalar_dense", "aten::_linalg_check_errors", "aten::_unsafe_view"}
PLENTY = 2**34  # bytes
# Any function would do: an error that is pending when a call of a `PyDLL` is over is raised. Looked up now, because a
# look-up would take the error away.
_raise_pending = ctypes.pythonapi.Py_IsInitialized
_LIBRARY: list[Any] = []  # registrations live as long as this


@dataclass
class Tally:
    """What a GPU would have been asked for."""

    launches: int = 0
    waits: int = 0
    crossed: int = 0  # bytes between host and device


@dataclass
class Memory:
    """Bytes of the tensors that lie on the device, now and at most; what goes beyond `limit` is refused.

    Storages are counted once however many views they have, and without a real allocator's rounding and holes.
    """

    held: int = 0
    peak: int = 0
    limit: int = PLENTY

    def take(self, held: Tensor) -> None:
        """A tensor comes to lie there."""
        storage = held.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in _lying:
            return
        if self.held + size > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} B, {self.held} B are in use")
        self.held += size
        self.peak = max(self.peak, self.held)
        _lying[key] = weakref.ref(storage, lambda _: self._let_go(key, size))

    def _let_go(self, key: int, size: int) -> None:
        self.held -= size
        del _lying[key]


_lying: dict[int, Any] = {}
memory = Memory()
_watcher: Callable[[], None] | None = None  # may raise what is to go wrong
_failure: str | None = None  # what every operation says; CUDA, too, stays broken in a process
_tally = Tally()
_generators: list[torch.Generator] = []


class There(Tensor):
    """A tensor on the device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        memory.take(held)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _done(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        _tally.waits += 1
        return f"There({self.held!r})"

    def __setitem__(self, index: Any, value: Any) -> None:
        """A number stays on the host, as for CUDA, where torch would bring it to any other device."""
        given = value if isinstance(value, Tensor) else torch.tensor(value, dtype=self.dtype)
        super().__setitem__(index, given)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """Another tensor's place and numbers can be put in the place of this one's (`in_float32`, `free`)."""
        return self.detach()

    @data.setter
    def data(self, new: "There") -> None:
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.held = new.held

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if not self.dim() else super().__format__(spec)

    def tolist(self) -> Any:
        _tally.waits += 1
        _tally.crossed += self.numel() * self.element_size()
        return self.held.tolist()

    def __deepcopy__(self, memo: Any) -> Tensor:
        copied = There(self.held.clone())
        trained = isinstance(self, torch.nn.Parameter)
        return torch.nn.Parameter(copied, self.requires_grad) if trained else copied.requires_grad_(self.requires_grad)


class _Everywhere(TorchDispatchMode):
    """Sees operations without a tensor of the device, too: those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _done(func, args, kwargs or {})


class _Guard(_DummyDeviceGuard):  # type: ignore[misc]
    """What torch asks for the kind of the device, also while an error is on its way out of a backward pass.

    There its C++ ends the process if a call from it returns while Python has an error pending. So the error is taken
    out of its way here, and `_Engine` raises it.
    """

    raised: BaseException | None = None

    def type_(self) -> Any:
        try:
            _raise_pending()
        except BaseException as error:
            _Guard.raised = error
        return torch._C._autograd.DeviceType.PrivateUse1


class _Engine(torch._C._ImperativeEngine):
    """Backward passes, from which errors of the device come as Python raised them."""

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().run_backward(*args, **kwargs)
        except SystemError:  # torch has an error, and Python none
            error, _Guard.raised = _Guard.raised, None
            if error is None:
                raise
            raise error from None


def install() -> None:
    """Make the device known to torch, once in a process."""
    _setup_privateuseone_for_python_backend(NAME, device_guard=_Guard())
    torch.autograd.Variable._execution_engine = _Engine()
    own = ModuleType(f"torch.{NAME}")
    own.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
    own.is_available = lambda: True  # type: ignore[attr-defined]
    own.current_device = lambda: 0  # type: ignore[attr-defined]
    own.device_count = lambda: 1  # type: ignore[attr-defined]
    own.is_initialized = lambda: True  # type: ignore[attr-defined]
    own._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
    own.manual_seed_all = lambda _: None  # type: ignore[attr-defined]
    if not hasattr(torch, NAME):
        torch._register_device_module(NAME, own)
    else:
        vars(getattr(torch, NAME)).update({k: v for k, v in vars(own).items() if not k.startswith("__")})
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _LIBRARY.append(library)


@contextmanager
def switched_on() -> Iterator[Tally]:
    """Operations go through the rules; what they would have cost is counted."""
    global _tally
    _tally = Tally()
    with _Everywhere():
        yield _tally


def fail(words: str | None) -> None:
    """From now on every operation of the device fails with these words; None = it works again."""
    global _failure
    _failure = words


def watch(before: Callable[[], None] | None) -> None:
    """From now on this is called before every operation of the device, in its thread; None = nothing is."""
    global _watcher
    _watcher = before


def tally() -> Tally:
    """What was counted since the device was switched on."""
    return _tally


def wait() -> None:
    """The host waits for all that the device was asked for."""
    _tally.waits += 1


def generator(device: Any) -> torch.Generator:
    """`torch.Generator(device)`."""
    made = torch.Generator()
    if torch.device(device).type == NAME:
        _generators.append(made)
    return made


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return There(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return There(torch.empty(size, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _count_copy(source, target, goes=isinstance(target, There), blocking=not non_blocking)
    _held(target).copy_(_held(source))
    return target


# --- one operation ---------------------------------------------------------------------------------


def _held(value: Any) -> Any:
    return value.held if isinstance(value, There) else value


def _done(func: Any, args: Any, kwargs: Any) -> Any:
    leaves = tree_leaves((args, kwargs))
    there = [t for t in leaves if isinstance(t, There)]
    made_there = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == NAME
    if not there and not made_there:
        return func(*args, **kwargs)
    if _watcher is not None:
        _watcher()
    if _failure is not None:
        raise RuntimeError(_failure)
    here = [t for t in leaves if isinstance(t, Tensor) and not isinstance(t, There)]
    rules.check(func, there, here, args)
    source = kwargs.get("generator")
    # torch hands operations another object of the same generator: its seed, from a hash, tells which it is.
    seeds = {one.initial_seed() for one in _generators}
    if made_there and source is not None and source.initial_seed() not in seeds:
        raise rules.Refused(f"{func._schema.name}: a generator of the host for a tensor of the device")
    own_args, own_kwargs = tree_map(_held, (args, kwargs))
    return _special(func._schema.name)(func, args, kwargs, own_args, own_kwargs)


def _special(name: str) -> Callable[..., Any]:
    kinds = {
        "aten::copy_": _copied, "aten::_to_copy": _moved, "torch_attn::_varlen_attn": _attended,
        "torch_attn::_varlen_attn_backward": _attended_backward,
        "aten::_efficient_attention_forward": _attended_efficiently,
        "aten::_efficient_attention_backward": _attended_efficiently_backward,
    }  # fmt: skip
    return kinds.get(name, _plain)


def _plain(func: Any, args: Any, kwargs: Any, own_args: Any, own_kwargs: Any) -> Any:
    name, returns = func._schema.name, func._schema.returns
    if "device" in own_kwargs:
        own_kwargs["device"] = torch.device("cpu")
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    _tally.waits += waits.of(func, args, kwargs)
    _tally.crossed += waits.bytes_of_indices(func, args, kwargs)
    _tally.launches += not views and name not in NO_KERNEL and "empty" not in name
    found = func(*own_args, **own_kwargs)
    written = [r.alias_info is not None and r.alias_info.is_write for r in returns]
    if written and all(written) and len(returns) == 1:
        return kwargs["out"] if "out" in kwargs else args[0]
    return tree_map(lambda t: There(t) if isinstance(t, Tensor) else t, found)


def _copied(func: Any, args: Any, kwargs: Any, own_args: Any, own_kwargs: Any) -> Any:
    blocking = not _named(func, args, kwargs).get("non_blocking", False)
    _count_copy(args[1], args[0], goes=isinstance(args[0], There), blocking=blocking)
    func(*own_args, **own_kwargs)
    return args[0]


def _count_copy(source: Tensor, target: Tensor | None, *, goes: bool, blocking: bool) -> None:
    """`goes`: to the device. `target`: None where torch makes it."""
    comes = isinstance(source, There)
    _tally.waits += waits.of_copy(source=source, target=target, blocking=blocking, comes=comes, goes=goes)
    if comes == goes:
        _tally.launches += 1
    else:
        _tally.crossed += source.numel() * source.element_size()


def _moved(func: Any, args: Any, kwargs: Any, own_args: Any, own_kwargs: Any) -> Any:
    """`Tensor.to`: to another device, another dtype, or both."""
    comes, goes = isinstance(args[0], There), kwargs.get("device")
    stays = comes if goes is None else torch.device(goes).type == NAME
    _count_copy(args[0], None, goes=stays, blocking=not kwargs.get("non_blocking", False))
    found = func(*own_args, **{**own_kwargs, "device": torch.device("cpu")})
    found = found.clone() if found.numel() and found.data_ptr() == own_args[0].data_ptr() else found
    return There(found) if stays else found


def _attended(func: Any, args: Any, kwargs: Any, own_args: Any, own_kwargs: Any) -> Any:
    named = _named(func, own_args, own_kwargs)
    q, k, v, ends = (named[name] for name in ("query", "key", "value", "cu_seq_q"))
    _tally.launches += 1
    with torch.no_grad():
        found = flash.forward(q, k, v, ends, **_shape(named, q))
    rest = torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)
    return There(found), *(There(t) for t in rest)


def _attended_backward(func: Any, args: Any, kwargs: Any, own_args: Any, own_kwargs: Any) -> Any:
    named = _named(func, own_args, own_kwargs)
    grad, q, k, v, ends = (named[name] for name in ("grad_out", "query", "key", "value", "cu_seq_q"))
    _tally.launches += 3
    return tuple(There(t) for t in flash.backward(grad, q, k, v, ends, **_shape(named, q)))


def _attended_efficiently(func: Any, args: Any, kwargs: Any, own_args: Any, own_kwargs: Any) -> Any:
    named = _named(func, own_args, own_kwargs)
    q, k, v, ends = (named[name] for name in ("query", "key", "value", "cu_seqlens_q"))
    _tally.launches += 1
    with torch.no_grad():
        found = flash.forward(q[0], k[0], v[0], ends, **_band(named))
    rest = torch.zeros(len(ends) - 1, q.shape[2], named["max_seqlen_q"]), *(torch.zeros((), dtype=torch.long),) * 2
    return There(found[None]), *(There(t) for t in rest), named["max_seqlen_q"], named["max_seqlen_k"]


def _attended_efficiently_backward(func: Any, args: Any, kwargs: Any, own_args: Any, own_kwargs: Any) -> Any:
    named = _named(func, own_args, own_kwargs)
    grad, q, k, v = (named[name][0] for name in ("grad_out_", "query", "key", "value"))
    _tally.launches += 2
    found = flash.backward(grad, q, k, v, named["cu_seqlens_q"], **_band(named))
    return *(There(t[None]) for t in found), None


def _band(named: dict[str, Any]) -> dict[str, Any]:
    """Its window counts a token itself; with mask 1 a token sees none behind it, without a mask a window is refused."""
    if named["custom_mask_type"] != 1:
        raise rules.Refused("only the causal mask of memory-efficient attention is pretended")
    reach = named.get("window_size")
    return {"scale": named["scale"], "window": [-1 if reach is None else reach - 1, 0]}


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    return {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}


def _shape(named: dict[str, Any], q: Tensor) -> dict[str, Any]:
    return {"scale": named.get("scale") or q.shape[-1] ** -0.5, "window": named.get("window_size") or [-1, -1]}
