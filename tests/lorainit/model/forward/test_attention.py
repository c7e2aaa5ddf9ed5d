"""Attention inside each row of a packed batch: the same as row by row, whatever the architecture asks for."""

import random

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import MistralConfig, MistralForCausalLM

from lorainit.data.batches import collate, pack
from lorainit.data.dataset import Sample
from lorainit.data.reader import load
from lorainit.model.forward import attention
from lorainit.model.forward.loss import sum_losses
from lorainit.model.layout import choose_layout
from lorainit.model.load import load_model
from tests.lorainit.conftest import make_tokenizer

CPU, F64 = torch.device("cpu"), torch.float64
SMALL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def reference(q, k, v, lengths, window=None):
    """Row by row with torch's own attention and a mask written out."""
    parts, start = [], 0
    for n in lengths:
        distance = torch.arange(n)[:, None] - torch.arange(n)
        seen = (distance >= 0) & (distance < (window or n))
        row = [t[:, :, start : start + n] for t in (q, k, v)]
        parts.append(F.scaled_dot_product_attention(*row, attn_mask=seen, scale=0.3, enable_gqa=True))
        start += n
    return torch.cat(parts, dim=2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
def test_values_and_gradients_are_those_of_rows_alone(monkeypatch, heads, window):
    """Rows shorter than a block of queries, as long, and longer."""
    lengths = [1, 16, 40, 33]
    monkeypatch.setattr(attention, "BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, sum(lengths), 8, generator=generator, dtype=F64).requires_grad_()
        for h in (heads[0], heads[1], heads[1])
    )
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    found, none = attention.attend(
        torch.nn.Module(), q, k, v, None, scaling=0.3, sliding_window=window, cu_seq_lens_q=ends
    )
    expected = reference(q, k, v, lengths, window)
    assert none is None
    assert torch.allclose(found, expected, atol=1e-6)
    upper = torch.randn(found.shape, generator=generator, dtype=F64)
    ours, theirs = (torch.autograd.grad((y * upper).sum(), [q, k, v]) for y in (found, expected))
    for one, two in zip(ours, theirs, strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_values_may_be_wider_than_keys():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 30, d, generator=generator, dtype=F64) for h, d in ((4, 6), (2, 6), (2, 10)))
    pairs = [t.requires_grad_() for t in (q, k, v)]
    found, _ = attention.attend(torch.nn.Module(), q, k, v, None, scaling=0.3, cu_seq_lens_q=torch.tensor([0, 11, 30]))
    expected = reference(q, k, v, [11, 19])
    assert torch.allclose(found, expected, atol=1e-6)
    upper = torch.randn(found.shape, generator=generator, dtype=F64)
    ours, theirs = (torch.autograd.grad((y * upper).sum(), pairs) for y in (found, expected))
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(ours, theirs, strict=True))


# Of the largest value: what rounding in the format may do to a sum of a few dozen.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_whatever_the_shape_it_is_torchs_own_attention(monkeypatch, dtype, seed):
    """Heads of any width and number, windows, rows of any lengths, packed or side by side; against float64."""
    chance, generator = random.Random(f"{dtype} {seed}"), torch.Generator().manual_seed(seed)
    monkeypatch.setattr(attention, "BLOCK", chance.choice([1, 7, 16]))
    monkeypatch.setattr(attention, "KEPT", chance.choice([0, 9, 512]))
    for _ in range(8):
        groups, keys, window = chance.randint(1, 3), chance.randint(1, 3), chance.choice([None, 1, 2, 11, 100])
        d, wide, rows = chance.randint(1, 21), chance.randint(1, 21), chance.randint(1, 4)
        lengths = [chance.randint(1, 30) for _ in range(rows)]
        if side_by_side := chance.random() < 0.4:
            lengths = lengths[:1] * rows
        shapes = [(groups * keys, d), (keys, d), (keys, wide)]
        q, k, v = (
            torch.randn(1, h, sum(lengths), n, generator=generator).to(dtype).requires_grad_() for h, n in shapes
        )
        if side_by_side:
            given = [t.unflatten(2, (rows, -1))[0].transpose(0, 1) for t in (q, k, v)]
            found, _ = attention.attend(torch.nn.Module(), *given, None, scaling=0.3, sliding_window=window)
            found = found.flatten(0, 1)[None]
        else:
            ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
            found, _ = attention.attend(
                torch.nn.Module(), q, k, v, None, scaling=0.3, sliding_window=window, cu_seq_lens_q=ends
            )
        exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
        expected, upper = reference(*exact, lengths, window), torch.randn(found.shape, generator=generator)  # type: ignore[call-arg]
        ours = [found, *torch.autograd.grad((found * upper).sum(), [q, k, v])]
        theirs = [expected, *torch.autograd.grad((expected * upper).sum(), exact)]
        for one, two in zip(ours, theirs, strict=True):
            assert (one.double() - two).abs().max() <= ROUNDING[dtype] * two.abs().max().clamp(min=0.1)


class Kernels:
    """Both kernels of a GPU, as far as `attention` has to know: what they take, and what they make of it."""

    def flash(self, q, k, v, ends, longest, scale, window):
        width = q.shape[-1]
        assert q.dtype in attention.HALVES
        assert width % 8 == 0
        assert width <= 192 or width == 256
        return self._rows(q, k, v, ends, longest, scale, window)

    def efficient(self, q, k, v, ends, longest, scale, window):
        assert q.shape[2] == k.shape[2] == v.shape[2]
        assert q.shape[-1] * q.element_size() % 16 == 0
        return self._rows(q[0], k[0], v[0], ends, longest, scale, window)[None]

    def _rows(self, q, k, v, ends, longest, scale, window):
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        lengths = ends.diff().tolist()
        assert max(lengths) == longest
        assert scale == 0.3
        return reference(*(t.transpose(0, 1)[None] for t in (q, k, v)), lengths, window)[0]  # type: ignore[call-arg]


@pytest.mark.parametrize("widest", [24, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whatever_the_shape_a_kernel_is_given_what_it_takes(monkeypatch, dtype, widest):
    kernels, chance, generator = Kernels(), random.Random(str(dtype)), torch.Generator().manual_seed(0)
    monkeypatch.setattr(attention, "_flash", kernels.flash)
    monkeypatch.setattr(attention._Efficient, "apply", kernels.efficient)
    for _ in range(15):
        groups, keys, window = chance.randint(1, 3), chance.randint(1, 3), chance.choice([None, 1, 5])
        d, wide, lengths = chance.randint(1, widest), chance.randint(1, widest), [chance.randint(1, 12)] * 2
        shapes = [(groups * keys, d), (keys, d), (keys, wide)]
        q, k, v = (torch.randn(1, h, sum(lengths), n, generator=generator).to(dtype) for h, n in shapes)
        expected = reference(q, k, v, lengths, window)
        ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        packed = attention._on_cuda(q, k, v, ends, lengths[0], 0.3, window)
        beside = [t.unflatten(2, (2, -1))[0].transpose(0, 1) for t in (q, k, v)]
        padded = attention._on_cuda(*beside, None, lengths[0], 0.3, window).flatten(0, 1)[None]  # type: ignore[call-arg]
        for found in (packed, padded):
            assert torch.allclose(found.float(), expected.float(), atol=2e-2 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", attention.OTHER_THINGS)
def test_what_attention_is_asked_for_beside_that_is_refused(name):
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(attention.UnsupportedAttention):
        attention.attend(torch.nn.Module(), q, q, q, None, **{name: torch.zeros(1)})
    assert attention.attend(torch.nn.Module(), q, q, q, None, **{name: None})[0].isfinite().all()


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_packed_rows_give_the_loss_and_gradients_of_padded_ones_under_stock_attention(bases, rows, base):
    samples = load(rows, make_tokenizer(), max_length=256).samples[:6]
    found = []
    for packed in (False, True):
        model = load_model(bases[base], dtype=torch.float32, device=CPU)
        if packed:
            assert choose_layout(model).rows == "packed"
        frozen = model.get_output_embeddings().weight
        moved = [p.requires_grad_() for p in model.parameters() if p is not frozen]
        part = sum_losses(model, pack(samples) if packed else collate(samples, pad=0))
        found.append([part.loss.detach(), *torch.autograd.grad(part.loss, moved)])
    for one, two in zip(*found, strict=True):
        assert float((one - two).norm()) <= 2e-6 * float(two.norm())


def test_no_row_sees_another(bases):
    model = load_model(bases["llama"], dtype=torch.float32, device=CPU)
    assert choose_layout(model).rows == "packed"
    one, two = torch.arange(5, 25), torch.arange(40, 70)

    def hidden(first, second):
        batch = pack([Sample(0, ids.int(), torch.zeros(len(ids), dtype=torch.bool)) for ids in (first, second)])
        with torch.no_grad():
            return model.model(input_ids=batch.ids, use_cache=False, **batch.layout).last_hidden_state[0]

    before, after = hidden(one, two), hidden(one + 100, two)
    assert not torch.allclose(before[:20], after[:20])
    assert torch.equal(before[20:], after[20:])


def test_a_sliding_window_is_honoured():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)).eval()
    ids = torch.randint(320, (1, 24))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert choose_layout(model).rows == "packed"
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
