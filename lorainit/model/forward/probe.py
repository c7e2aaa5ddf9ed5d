"""Runs a few short rows through a model in a given layout and returns values and gradients, to compare layouts.

Windows and chunks that the configuration names are shortened meanwhile, because otherwise short rows would not show how
a window treats tokens outside of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorainit.data.batches import Batch, Budget, Regime, split_into_batches
from lorainit.data.dataset import Sample

_WORDS = ("window", "chunk", "local_attention")  # the last is ModernBERT's
CUT = 16  # longest window or chunk during the probe
NO_WINDOW = 3  # the length for which rows are made if the configuration names no window
# The most bytes of a float32 copy in main memory; on a GPU it is half of the free memory.
COPY_BYTES = 2 << 30

MakeBatch = Callable[[Sequence[Sample]], Batch]


class RowOutputs(NamedTuple):
    """For each row, float32 on the CPU, tokens×width: the output head's input (`values`), and a gradient.

    The gradient of a fixed random weighted sum of the values with respect to the row's embeddings.
    """

    values: list[Tensor]
    gradients: list[Tensor]


def make_rows(model: Any, window: int) -> list[Sample]:
    """Three rows: longer than two windows, longer than one, and of one token, with random ids that are not special."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    special = {v for c in _configs(model) for n, v in vars(c).items() if "token" in n and isinstance(v, int)}
    plain = torch.tensor([i for i in range(min(vocabulary, 4096)) if i not in special])
    generator = torch.Generator().manual_seed(0)
    found = []
    for line, length in enumerate((2 * window + 5, window + 3, 1)):
        ids = plain[torch.randint(len(plain), (length,), generator=generator)].int()
        found.append(Sample(line, ids, torch.zeros(length, dtype=torch.bool)))
    return found


@torch.enable_grad()
def run_rows(
    model: Any,
    rows: Sequence[Sample],
    make_batch: MakeBatch,
    *,
    size: int,
    regime: Regime,
    only: Callable[[int], bool] = lambda _line: True,
) -> RowOutputs:
    """Run the rows, at most `size` to a pass.

    Args:
        make_batch: makes a packed or a padded batch of rows.
        only: which rows, by line, are in the sum whose gradient is taken.
    """
    values, gradients = dict[int, Tensor](), dict[int, Tensor]()
    for piece in split_into_batches(rows, Budget(size), regime):
        batch = make_batch(piece)
        hidden, leaf = _run(model, batch)
        spans = _spans(piece, batch)
        total = hidden.new_zeros((), dtype=torch.float32)
        for row, (start, stop) in zip(piece, spans, strict=True):
            values[row.line] = hidden[start:stop].detach().float().cpu()
            if only(row.line):
                total = total + (hidden[start:stop].float() * _weights(row, hidden)).sum()
        (grad,) = torch.autograd.grad(total, leaf)
        for row, (start, stop) in zip(piece, spans, strict=True):
            gradients[row.line] = grad.flatten(0, -2)[start:stop].float().cpu()
    return RowOutputs(*([found[row.line] for row in rows] for found in (values, gradients)))


def _weights(row: Sample, hidden: Tensor) -> Tensor:
    shape = len(row.ids), hidden.shape[1]
    return torch.randn(shape, generator=torch.Generator().manual_seed(row.line)).to(hidden.device)


def _spans(rows: Sequence[Sample], batch: Batch) -> list[tuple[int, int]]:
    """First and last position + 1 of each row in the flattened batch."""
    packed, length = len(batch.ids) < len(rows), batch.ids.shape[1]
    spans, start = [], 0
    for row in rows:
        spans.append((start, start + len(row.ids)))
        start += len(row.ids) if packed else length
    return spans


def _run(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The output head's input, positions×width, and the embeddings that it was computed from.

    The whole model runs, as in training, because the trial must show that the rows' boundaries reach the layers.
    """
    leaves: list[Tensor] = []
    heard: list[Tensor] = []

    def begin(_module: nn.Module, _args: Any, found: Tensor) -> Tensor:
        leaves.append(found.detach().requires_grad_())
        return leaves[-1].clone()  # some models multiply it in place

    def listen(_head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        heard.append(args[0].flatten(0, -2))
        return (args[0][..., -1:, :],)  # one position is enough, because the logits are not used and may be large

    handles = [
        model.get_input_embeddings().register_forward_hook(begin),
        model.get_output_embeddings().register_forward_pre_hook(listen),
    ]
    try:
        model(input_ids=batch.ids, use_cache=False, **batch.layout)
    finally:
        for handle in handles:
            handle.remove()
    if len(leaves) != 1 or len(heard) != 1 or len(heard[0]) != batch.ids.numel():
        raise ValueError("its embeddings or its output head are not used once for each token")
    return heard[0], leaves[0]


# --- how far apart ------------------------------------------------------------------------------


def measure_distances(found: RowOutputs, truth: RowOutputs) -> tuple[Tensor, Tensor]:
    """The relative distance at each token of all rows, for the values and for the gradients.

    A tenth of the usual norm in the row is added to the divisor, so that tokens with a tiny norm do not dominate.
    """
    pairs = zip(found, truth, strict=True)
    values, gradients = (torch.cat([_apart(x, t) for x, t in zip(xs, ts, strict=True)]) for xs, ts in pairs)
    return values, gradients


def _apart(x: Tensor, truth: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(truth, dim=1)
    usual = norms.square().mean().sqrt()
    off: Tensor = torch.linalg.vector_norm(x - truth, dim=1) / (norms + 0.1 * usual).clamp(min=1e-30)
    return off


# --- during the probe ---------------------------------------------------------------------------


class Windows(NamedTuple):
    """The windows and chunks of a model. `longest`: the longest one during the probe. `cut`: those that are shortened.

    `hidden`: the longest shortened one that hides tokens, 0 = none. Chunks of a state-space model hide nothing, because
    they only divide the computation. `beyond`: the longest one that cannot be shortened and that no row of the probe
    reaches, 0 = none.
    """

    longest: int
    cut: list[tuple[Any, str, int]]
    hidden: int
    beyond: int = 0


def find_windows(model: Any) -> Windows:
    """Find entries of the configurations that name a window or a chunk, and modules that have copied the number."""
    named = [(c, n, v) for c in _configs(model) for n, v in vars(c).items() if _is_window(n, v)]
    text = model.config.get_text_config()
    ours = [(n, v) for c, n, v in named if c is text]
    long = {value for _, _, value in named if value > CUT}
    held = [(m, n, v) for m in model.modules() for n, v in vars(m).items() if _is_window(n, v) and v in long]
    kinds = getattr(text, "layer_types", None)
    used = kinds is None or any("sliding" in kind or "chunk" in kind for kind in kinds)
    hidden = max((v for n, v in ours if v > CUT and used and ("window" in n or "attention" in n)), default=0)
    longest = max((min(CUT, value) for _, value in ours), default=NO_WINDOW)
    return Windows(longest, [(c, n, v) for c, n, v in named if v > CUT] + held, hidden, _beyond(text))


def _beyond(text: Any) -> int:
    """The longest group of tokens that a model compresses into one (DeepSeek V4) or chooses as a block (MiniMax M3)."""
    rates = [v for n, value in vars(text).items() if "compress_r" in n for v in _integers(value)]
    blocks = (getattr(text, "index_topk_blocks", None) or 0) * (getattr(text, "index_block_size", None) or 0)
    return max((value for value in (*rates, blocks) if value > CUT), default=0)


def _integers(value: Any) -> list[int]:
    found = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    return [one for one in found if type(one) is int]


@contextmanager
def shorten_windows(windows: Windows) -> Iterator[None]:
    """Shorten these windows to `CUT` while the context lasts."""
    try:
        for owner, name, _ in windows.cut:
            vars(owner)[name] = CUT
        yield
    finally:
        for owner, name, value in windows.cut:
            vars(owner)[name] = value


def _is_window(name: str, value: Any) -> bool:
    named = any(word in name for word in _WORDS) and "layers" not in name and not name.startswith(("use", "num"))
    return named and type(value) is int and value > 1


def _configs(model: Any) -> list[Any]:
    """The configurations of the model and of its modules, each once."""
    held = (vars(module).get("config") for module in model.modules())
    top = [model.config, model.config.get_text_config(), *held]
    return list({id(config): config for config in top if hasattr(config, "model_type")}.values())


@contextmanager
def convert_to_float32(model: nn.Module, *, copy: bool) -> Iterator[bool]:
    """Convert weights in half precision to float32 while the context lasts, if `copy` allows and memory suffices.

    Yields:
        Whether everything is computed in float32.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]
    divided = any(hasattr(t, "full_tensor") for t in model.parameters())
    if divided or 4 * sum(t.numel() for t in tensors) > (_copy_bytes(model) if copy else 0):
        yield next(model.parameters()).dtype == torch.float32 and not tensors
        return
    before = [(t, t.data) for t in tensors]
    # Four-bit layers of bitsandbytes have a format of computation of their own, which is changed too.
    computing: list[Any] = [m for m in model.modules() if getattr(m, "compute_dtype", None) in _HALVES]
    types = [m.compute_dtype for m in computing]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        for module in computing:
            module.compute_dtype = torch.float32
        yield True
    finally:
        for tensor, data in before:
            tensor.data = data
        for module, dtype in zip(computing, types, strict=True):
            module.compute_dtype = dtype


_HALVES = (torch.bfloat16, torch.float16)


def _copy_bytes(model: nn.Module) -> int:
    device = next(model.parameters()).device
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else COPY_BYTES
