"""Positions that depend on a row's length: such rows share a pass only with their like, wherever rows are looked at."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lorainit.context import RunRequest
from lorainit.data.batches import Budget, any_length, collate, pack, split_into_batches
from lorainit.data.dataset import Sample
from lorainit.data.reader import load
from lorainit.init.collectors.gradients import compute_mean_gradients
from lorainit.model.forward.loss import row_losses, sum_losses_by_adapter
from lorainit.model.forward.positions import forget_lengths, regime_of
from lorainit.model.layout import choose_layout
from lorainit.model.load import load_model
from lorainit.model.targets.targets import find_targets
from lorainit.run import run, run_together
from tests.lorainit.conftest import make_tokenizer
from tests.lorainit.model.forward.test_attention import SMALL
from tests.zoo.bases import make

pytestmark = pytest.mark.usefixtures("training_only")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory, rows):
    """Phi-3 whose factors change at the median length of the rows."""
    folder = make("phi3-longrope", tmp_path_factory.mktemp("zoo") / "phi3")
    lengths = sorted(len(s.ids) for s in load(rows, make_tokenizer(), max_length=256).samples)
    text = (folder / "config.json").read_text()
    config = json.loads(text)
    limit = lengths[len(lengths) // 2]
    config["original_max_position_embeddings"] = limit
    config["rope_parameters"]["original_max_position_embeddings"] = limit
    (folder / "config.json").write_text(json.dumps(config))
    assert lengths[0] <= limit < lengths[-1]
    return folder


@pytest.fixture
def wanted(spec, base):
    def make_spec(**more):
        model = {"id": "phi3", "source": str(base), "root": "tests/phi3", "max_length": 256}
        return spec(**{"model": model, "lora": {"init": "kaiming", "r": 4}, **more})

    return make_spec


def samples_of(*lengths):
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, 300, (n,), generator=generator, dtype=torch.int32) for n in lengths]
    return [Sample(i, row, torch.ones(len(row), dtype=torch.bool)) for i, row in enumerate(ids)]


def dynamic():
    """A Llama of 16 positions whose frequencies grow with the length from there on."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, max_position_embeddings=16, initializer_range=0.15)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    forget_lengths(model)
    return model


def test_only_rows_of_one_regime_share_a_micro_batch():
    rows = samples_of(3, 9, 5, 12, 7, 4, 10)
    pieces = split_into_batches(rows, Budget(3), lambda n: int(n > 7))
    assert [[len(s.ids) for s in piece] for piece in pieces] == [[12, 10, 9], [7, 5, 4], [3]]
    assert [len(piece) for piece in split_into_batches(rows, Budget(3), lambda n: None)] == [1] * 7
    assert [len(piece) for piece in split_into_batches(rows, Budget(3))] == [3, 3, 1]


def test_regimes_are_those_of_the_rotary_embedding(base):
    model = load_model(base, dtype=torch.float32, device=CPU)
    limit = model.config.rope_parameters["original_max_position_embeddings"]
    regime = regime_of(model)
    assert regime(1) == regime(limit) != regime(limit + 1) == regime(10 * limit)


def test_most_models_have_one_regime(bases):
    assert regime_of(load_model(bases["llama"], dtype=torch.float32, device=CPU)) is any_length


def test_with_dynamic_frequencies_long_rows_share_a_pass_with_rows_of_their_length():
    regime = regime_of(dynamic())
    assert regime(3) == regime(16)
    assert len({regime(n) for n in (16, 17, 18, 40)}) == 4


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]], ids=str)
def test_with_dynamic_frequencies_a_row_is_what_a_fresh_model_makes_of_it(order):
    rows = samples_of(40, 24, 16)
    expected = [dynamic()(input_ids=row.ids.long()[None]).logits for row in rows]
    model = dynamic()
    for i in order:
        assert torch.equal(model(input_ids=rows[i].ids.long()[None]).logits, expected[i])


@pytest.mark.parametrize("lay", ["packed", "padded"])
def test_the_loss_of_rows_of_both_sides_is_that_of_rows_alone(base, rows, lay):
    model = load_model(base, dtype=torch.float32, device=CPU)
    samples = load(rows, make_tokenizer(), max_length=256).samples
    layout = choose_layout(model)
    assert layout.rows == "packed"

    def losses(size, regime):
        found = {}
        for piece in split_into_batches(samples, Budget(size), regime):
            batch = pack(piece) if lay == "packed" else collate(piece, pad=0)
            parts = sum_losses_by_adapter(model, batch, [int(row.trained[1:].sum()) for row in piece])
            found |= {row.line: part.loss for row, part in zip(piece, parts, strict=True)}
        return torch.stack([found[row.line] for row in samples])

    alone = losses(1, any_length)
    assert torch.allclose(losses(12, layout.regime), alone, rtol=1e-5)
    off = (losses(12, any_length) - alone).abs() / alone
    assert off.max() > 5e-3, "the base is one where it matters"


def test_gradients_of_both_sides_are_those_of_rows_alone(base, rows):
    model = load_model(base, dtype=torch.float32, device=CPU)
    samples = load(rows, make_tokenizer(), max_length=256).samples
    targets = find_targets(model, "all-linear")

    def gradients(**more):
        return compute_mean_gradients(model, targets, samples, pad=0, device=CPU, on_tick=lambda *_: None, **more)

    together, alone = gradients(budget=Budget(12), regime=regime_of(model)), gradients(budget=Budget(1))
    for name, G in alone.items():
        assert float((together[name] - G).norm()) <= 1e-4 * float(G.norm())
    mixed = gradients(budget=Budget(12))
    assert any(float((mixed[name] - G).norm()) > 1e-2 * float(G.norm()) for name, G in alone.items())


@pytest.mark.parametrize(
    "init",
    [
        "kaiming",
        pytest.param({"method": "hrp", "preheat_steps": 2}, marks=pytest.mark.slow),
        pytest.param({"method": "corda", "samples": 8}, marks=pytest.mark.slow),
    ],
)
def test_how_many_rows_share_a_pass_changes_no_adapter(wanted, rows, tmp_path, init):
    training = {"max_steps": 3, "batch_size": 6}
    found = []
    for size in (1, 6):
        more = {"lora": {"init": init, "r": 4}, "training": training, "micro_batch_size": size}
        done = run(wanted(**more, data={"validation": str(rows)}), tmp_path / str(size), lambda event: None)
        found.append(load_file(f"{done.adapter}/adapter_model.safetensors"))
    for name, one in found[0].items():
        assert torch.allclose(one, found[1][name], atol=2e-4, rtol=1e-2), name


def test_a_group_gives_the_bits_that_each_adapter_has_alone(wanted, tmp_path):
    specs = [wanted(seed=seed, micro_batch_size=3, training={"max_steps": 3, "batch_size": 6}) for seed in (1, 2)]
    requests = [RunRequest(one, tmp_path / f"group-{i}", lambda event: None) for i, one in enumerate(specs)]
    ends = dict(run_together(requests))
    for i, one in enumerate(specs):
        solo = run(one, tmp_path / f"solo-{i}", lambda event: None)
        shared = load_file(f"{ends[i].adapter}/adapter_model.safetensors")
        alone = load_file(f"{solo.adapter}/adapter_model.safetensors")
        assert all(torch.equal(shared[name], alone[name]) for name in alone)


def test_losses_of_rows_are_by_row(base, rows):
    """`row_losses`, which initializations look at, in passes of one regime."""
    model = load_model(base, dtype=torch.float32, device=CPU)
    samples = load(rows, make_tokenizer(), max_length=256).samples
    for piece in split_into_batches(samples, Budget(12), regime_of(model)):
        together = row_losses(model, collate(piece, pad=0))
        alone = torch.cat([row_losses(model, collate([row], pad=0)) for row in piece])
        assert torch.allclose(together, alone, rtol=1e-5)
