"""A base read by several processes, each its own part: what they hold together is the base, bit for bit."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.lorainit.conftest import make_tokenizer
from tests.lorainit.ranks import run_ranks
from tests.zoo.bases import KINDS, make
from tests.zoo.dense import DENSE
from tests.zoo.hybrids import HYBRIDS
from tests.zoo.mixtures import MIXTURES


def read_by(size: int, bases: dict[str, Path], folder: Path) -> list[dict[str, dict]]:
    """What each of so many processes found of each base."""
    (folder / "bases.json").write_text(json.dumps({name: str(base) for name, base in bases.items()}))
    run_ranks("tests.lorainit.parts", size, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A Llama of 113 MB, of which four layers are nearly all: enough to see in a process's memory."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=4, vocab_size=320)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def readers(request, large, tmp_path_factory) -> list[dict[str, dict]]:
    """Mixtral's experts lie in the files one by one; three processes cannot share four before they are joined."""
    folder = tmp_path_factory.mktemp("readers")
    return read_by(request.param, {"large": large, "mixtral": make("mixtral", folder / "mixtral")}, folder)


@pytest.mark.parametrize("name", ["large", "mixtral"])
def test_parts_that_were_read_are_together_the_whole_base_bit_for_bit(readers, name):
    assert [one[name]["other"] for one in readers] == [[]] * len(readers)


def test_each_process_reads_and_holds_its_part_of_the_layers_and_takes_no_memory_for_more(readers):
    for one in readers:
        found = one["large"]
        part = found["whole"] - found["layers"] + found["layers"] / len(readers)
        assert found["held"] == pytest.approx(part, rel=0.001)
        assert found["read"] == pytest.approx(part, rel=0.001)
        assert found["most"] < 1.2 * part + (8 << 20)


def test_the_next_layer_and_no_other_is_on_its_way_before_a_layer_is_computed(readers):
    """Memory: of a base that had to be divided, two layers at a time are whole."""
    for one in readers:
        whole = one["large"]["trace"]
        forward, backward = whole[: whole.index("back")], whole[whole.index("back") :]
        for order, steps in ((range(4), forward), (range(3, -1, -1), backward)):
            assert [int(step.split()[1]) for step in steps if step.startswith("gather")] == list(order)
            for layer, following in pairwise(order):
                assert steps.index(f"gather {following}") < steps.index(f"compute {layer}")
            for layer, far in zip(order, order[2:], strict=False):
                assert last(steps, f"done {layer}") < steps.index(f"gather {far}")


def last(steps: list[str], step: str) -> int:
    return len(steps) - 1 - steps[::-1].index(step)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_architecture_of_the_zoo_is_read_in_parts_or_refused(tmp_path):
    """Whatever transformers renames, joins or splits on the way."""
    kinds = [name for name in (*DENSE, *MIXTURES, *HYBRIDS) if not KINDS[name].missing]
    folders = {name: make(name, tmp_path / name) for name in kinds}
    bases = {name: folder for name, folder in folders.items() if folder.is_dir()}
    for one in read_by(2, bases, tmp_path):
        assert {name: found["other"] for name, found in one.items() if found.get("other")} == {}
        assert {name for name, found in one.items() if "refused" in found} <= {"rwkv", "zamba2"}
