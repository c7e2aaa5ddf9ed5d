"""How rows share a pass: whatever is chosen gives what stock eager attention gives each row alone."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from lorainit.data.batches import Budget, collate, copy_to_device, pack
from lorainit.data.dataset import Sample
from lorainit.model.forward import attention, probe
from lorainit.model.forward.loss import sum_losses_by_adapter
from lorainit.model.layout import choose_layout
from lorainit.model.load import load_model
from tests.lorainit.conftest import tiny_llama
from tests.lorainit.model.forward.test_attention import SMALL
from tests.zoo.bases import KINDS, make

CPU = torch.device("cpu")
TRAINS = [n for n, k in KINDS.items() if k.expected == "trains" and k.missing is None and k.family != "hostile"]
# Longer than twice every window and chunk of the zoo, in between, and short.
LENGTHS = (45, 41, 19, 7, 2)
PACKED = {
    "llama", "mistral", "qwen2", "gemma3", "gemma3n", "phi3-longrope", "gpt2", "opt", "diffllama", "deepseek_v3",
    "mixtral", "qwen3_moe",
}  # fmt: skip
PADDED = {
    "gemma2": "does more than weigh", "falcon": "does not let its attention be chosen", "bloom": "be chosen",
    "mpt": "be chosen", "gpt_oss": "does more than weigh", "llama4": "changed its hidden states",
    "deepseek_v32": "chooses 16 tokens of a pass", "lfm2": "changed its hidden states",
    "recurrent_gemma": "changed its hidden states", "mamba2": "be chosen",
}  # fmt: skip


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """The folder of a kind, made once."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = make(kind, tmp_path_factory.mktemp("zoo") / kind)
        return made[kind]

    return folder


def some_rows(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    ids = (torch.randint(3, 300, (n,), generator=generator, dtype=torch.int32) for n in lengths)
    return [Sample(line, row, torch.ones(len(row), dtype=torch.bool)) for line, row in enumerate(ids)]


def stock(folder, sample, attention):
    """Loss of a row alone by the stock architecture with this attention, and its gradient of every parameter."""
    model = load_model(folder, dtype=torch.float32, device=CPU)
    model.set_attn_implementation(attention)
    model.requires_grad_(True)
    logits = model(input_ids=sample.ids.long()[None], use_cache=False).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, sample.ids[1:].long(), reduction="sum")
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_rows_are_as_alone(folder, *, kind=None, attention="eager"):
    model = load_model(folder, dtype=torch.float32, device=CPU)
    layout, rows = choose_layout(model), some_rows()
    if kind:
        assert layout.rows == kind, layout.why
    model.requires_grad_(True)
    model.get_output_embeddings().requires_grad_(False)
    expected = [stock(folder, row, attention) for row in rows]
    passes = probe.split_into_batches(rows, Budget(8), layout.regime)
    for piece in passes:
        batch = pack(piece) if layout.rows == "packed" else collate(piece, pad=0)
        parts = sum_losses_by_adapter(model, batch, [len(row.ids) - 1 for row in piece])
        for part, row in zip(parts, piece, strict=True):
            assert float(part.loss.detach()) == pytest.approx(float(expected[row.line][0]), rel=1e-4)
        torch.stack([part.loss for part in parts]).sum().backward()
    for name, parameter in model.named_parameters():
        theirs = [grads[name] for _, grads in expected if name in grads]
        if parameter.grad is None or not theirs:
            continue
        total = torch.stack(theirs).sum(0)
        # Some gradients are zero but for rounding: a bias of all keys changes no softmax.
        assert float((parameter.grad - total).norm()) <= 3e-4 * float(total.norm()) + 1e-5, name


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "phi3-longrope", "opt", "deepseek_v3"])
def test_rows_that_share_a_pass_are_what_they_are_alone(zoo, kind):
    assert_rows_are_as_alone(zoo(kind), kind="packed")


@pytest.mark.parametrize("kind", ["llama4", "falcon", "mamba2", "recurrent_gemma"])
def test_padded_rows_are_what_they_are_alone(zoo, kind):
    assert_rows_are_as_alone(zoo(kind), kind="padded")


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINS)
def test_whatever_is_chosen_is_right(zoo, kind):
    assert_rows_are_as_alone(zoo(kind), attention=KINDS[kind].attention)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", sorted(PACKED))
def test_what_can_be_packed_is(zoo, kind, dtype):
    """In bf16 too: neither its rounding nor experts that change with it count as rows that see each other."""
    layout = choose_layout(load_model(zoo(kind), dtype=dtype, device=CPU))
    assert (layout.rows, layout.why) == ("packed", None)


@pytest.mark.parametrize("kind", sorted(PADDED))
def test_what_cannot_be_packed_is_padded_with_its_own_attention(zoo, kind):
    model = load_model(zoo(kind), dtype=torch.float32, device=CPU)
    before, ids = model.config._attn_implementation, torch.randint(3, 300, (1, 9))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    layout = choose_layout(model)
    assert layout.rows == "padded"
    assert PADDED[kind] in layout.why
    assert model.config._attn_implementation == before
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)


def test_where_stock_eager_is_not_what_a_base_is_loaded_with_the_latter_counts(zoo):
    """Falcon's eager attention adds ALiBi twice."""
    model = load_model(zoo("falcon-alibi"), dtype=torch.float32, device=CPU)
    assert choose_layout(model).rows == "padded"
    assert model.config._attn_implementation == "sdpa"


# --- mutants -------------------------------------------------------------------------------------


def leaking(model, share, *, dtype=torch.float32, direction=1):
    """Attention that is right, and something else in a layer that looks a little at a neighbour."""

    def leak(_module, _args, out):
        return out + share * out.roll(direction, dims=1)

    model.to(dtype)
    model.model.layers[1].mlp.register_forward_hook(leak)
    return model


def test_rows_that_leak_by_a_percent_are_refused():
    """In both formats, with and without room for a copy in float32."""
    for dtype in (torch.float32, torch.bfloat16):
        layout = choose_layout(leaking(tiny_llama(), 0.01, dtype=dtype))
        assert layout.rows != "packed"
        assert "packed rows changed its hidden states" in layout.why


def test_without_room_for_float32_rows_that_leak_by_a_percent_are_refused(monkeypatch):
    monkeypatch.setattr(probe, "COPY_BYTES", 0)
    layout = choose_layout(leaking(tiny_llama(), 0.01, dtype=torch.bfloat16))
    assert layout.rows != "packed"
    assert "packed rows see each other" in layout.why
    assert choose_layout(tiny_llama().to(torch.bfloat16)).rows == "packed"


def test_attention_whose_gradient_alone_is_wrong_is_refused(monkeypatch):
    right = attention._Rows.backward

    def wrong(ctx, *grads):
        dq, *others = right(ctx, *grads)
        return 1.01 * dq, *others

    monkeypatch.setattr(attention._Rows, "backward", wrong)
    layout = choose_layout(tiny_llama())
    assert layout.rows == "padded"
    assert "packed rows changed its gradients" in layout.why


def test_rows_that_depend_on_padding_go_one_by_one():
    """A model that looks at what comes after a row cannot even be padded."""
    layout = choose_layout(leaking(tiny_llama(), 0.01, direction=-1))
    assert layout.rows == "one by one"
    assert layout.regime(5) is None
    assert "; padded: " in layout.why


def test_without_memory_for_copies_the_base_is_tried_without_them(monkeypatch):
    copied, model = torch.Tensor.float, tiny_llama().to(torch.bfloat16)

    def float_(tensor):
        if tensor.shape == model.get_input_embeddings().weight.shape:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return copied(tensor)

    monkeypatch.setattr(torch.Tensor, "float", float_)
    assert choose_layout(model).rows == "packed"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        choose_layout(model)


def test_a_model_that_cannot_be_tried_goes_one_by_one_and_does_not_crash():
    model = tiny_llama()
    model.get_input_embeddings = lambda: None
    layout = choose_layout(model)
    assert layout.rows == "one by one"
    assert "could not be tried" in layout.why


# --- windows -------------------------------------------------------------------------------------


def test_a_window_longer_than_the_probe_is_cut_while_it_looks(monkeypatch):
    """An attention that knows nothing of a window of 4096 is found out with rows of 37 tokens."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4096, initializer_range=0.15)).eval()
    assert choose_layout(model).rows == "packed"
    assert model.config.sliding_window == 4096
    blind = attention._blocks
    monkeypatch.setattr(attention, "_blocks", lambda ends, _window: blind(ends, None))
    monkeypatch.setattr(attention, "_mask", lambda q, before, _window, dtype: plain_mask(q, before, dtype))
    layout = choose_layout(model)
    assert layout.rows == "padded"
    assert "changed its hidden states" in layout.why
    assert model.config.sliding_window == 4096


def plain_mask(queries, before, dtype):
    distance = torch.arange(before, before + queries)[:, None] - torch.arange(before + queries)
    return torch.zeros(distance.shape, dtype=dtype).masked_fill_(distance < 0, -torch.inf)


def test_a_window_that_cannot_be_cut_is_not_taken_for_tried(monkeypatch):
    """GPT-Neo keeps its window in a mask that was made when the model was."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=320, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=40, max_position_embeddings=128, initializer_range=0.15,
    )  # fmt: skip
    model = GPTNeoForCausalLM(config).eval()
    monkeypatch.setattr(model, "_supports_attention_backend", True, raising=False)
    layout = choose_layout(model)
    assert layout.rows == "padded"
    assert "window of 40 tokens cannot be tried" in layout.why


def test_rows_longer_than_what_sparse_attention_chooses_go_alone_and_are_right(zoo):
    """Of tokens that are as good, DeepSeek V3.2 takes one or another by how wide the pass is."""
    layout = choose_layout(load_model(zoo("deepseek_v32"), dtype=torch.float32, device=CPU))
    assert [layout.regime(tokens) for tokens in (1, 16, 17, 400)] == [0, 0, None, None]
    assert_rows_are_as_alone(zoo("deepseek_v32"), kind="padded")


@pytest.mark.parametrize(
    ("named", "tokens"),
    [
        ({"compress_rates": {"sparse": 4, "heavy": 128}}, 128),
        ({"index_topk_blocks": 16, "index_block_size": 128}, 2048),
    ],
)
def test_what_no_row_of_the_probe_reaches_goes_one_by_one(named, tokens):
    model = tiny_llama()
    vars(model.config).update(named)
    layout = choose_layout(model)
    assert layout.rows == "one by one"
    assert f"to {tokens} tokens together cannot be tried" in layout.why
    assert layout.regime(5) is None


def test_weights_and_windows_are_as_before():
    model = tiny_llama().to(torch.bfloat16)
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    choose_layout(model)
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (Gemma2Config(**SMALL, head_dim=8), Gemma2ForCausalLM),
        (BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4), BloomForCausalLM),
    ],
    ids=["capped scores", "positions in the scores"],
)
def test_scores_that_are_more_than_products_keep_their_own_attention(config, kind):
    torch.manual_seed(0)
    assert choose_layout(kind(config).eval()).rows == "padded"


@pytest.mark.parametrize("lay", [pack, lambda rows: collate(rows, pad=0)], ids=["packed", "padded"])
def test_a_batch_that_goes_elsewhere_in_one_piece_is_the_same_batch(lay):
    rows = [Sample(0, torch.arange(1, n, dtype=torch.int32), torch.arange(1, n) > 2) for n in (5, 9, 4)]
    batch = lay(rows)
    tensors = {"ids": batch.ids, "trained": batch.trained, "predicting": batch.predicting, "targets": batch.targets}
    tensors |= {name: value for name, value in batch.layout.items() if isinstance(value, torch.Tensor)}
    moved = copy_to_device(tensors, torch.device("cpu"))
    assert moved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert moved[name].dtype == tensor.dtype
        assert moved[name].is_contiguous()
        assert torch.equal(moved[name], tensor)
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved.values()}) == 1
