import json
import multiprocessing
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorainit.config.errors import RankTooLarge, SequenceTooLong, UnknownTarget, UnsupportedModel
from lorainit.config.spec import Lora
from lorainit.model import load as module
from lorainit.model.inspect import inspect
from lorainit.model.load import check_length, load_model, load_tokenizer, locate_base
from lorainit.model.source.digest import base_sha256
from lorainit.model.targets.targets import find_targets, resolve
from tests.lorainit.conftest import tiny_gpt2, tiny_llama

EMPTY_GGUF = b"GGUF" + struct.pack("<IQQ", 3, 0, 0)  # version, tensors, keys
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def suffixes(targets):
    return list(dict.fromkeys(name.rpartition(".")[2] for name in targets))


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("all-linear", ATTENTION + MLP),
        ("attention", ATTENTION),
        ("mlp", MLP),
        (["v_proj", "up_proj"], ["v_proj", "up_proj"]),
    ],
)
def test_targets_of_a_llama(wanted, found):
    targets = find_targets(tiny_llama(), wanted)
    assert suffixes(targets) == found
    assert len(targets) == 2 * len(found)


@pytest.mark.parametrize(
    ("wanted", "count"), [("all-linear", 8), ("attention", 4), ("mlp", 4), (["c_proj"], 4), (["mlp.c_proj"], 2)]
)
def test_targets_of_a_gpt2(wanted, count):
    assert len(find_targets(tiny_gpt2(), wanted)) == count


@pytest.mark.parametrize(
    ("suffix", "kind", "text"),
    [
        ("lm_head", UnknownTarget, "lm_head is of type Linear; .* output head"),
        ("embed_tokens", UnknownTarget, "model.embed_tokens is of type Embedding"),
        ("proj", UnknownTarget, "matches nothing.*q_proj"),
        ("mlp", UnknownTarget, "model.layers.0.mlp is of type LlamaMLP"),
    ],
)
def test_what_cannot_carry_a_lora_is_refused_by_name(suffix, kind, text):
    with pytest.raises(kind, match=text) as caught:
        find_targets(tiny_llama(), ["q_proj", suffix])
    assert caught.value.param == "lora.target_modules[1]"


def test_a_named_layer_smaller_than_the_rank_is_refused():
    with pytest.raises(RankTooLarge, match=r"lora\.r 17 .* \(16\) of 'k_proj' \(16x32\)") as caught:
        resolve(tiny_llama(), Lora(r=17, target_modules=["k_proj"]))
    assert caught.value.param == "lora.r"
    assert len(resolve(tiny_llama(), Lora(r=16, target_modules=["k_proj"]))[0]) == 2


def test_context_length_is_a_limit(bases, tmp_path):
    location = locate_base(str(bases["llama"]), cache=tmp_path)
    check_length(location, 256)
    with pytest.raises(SequenceTooLong, match="256"):
        check_length(location, 257)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("/nowhere", "no base model"),
        ("package:no_such_package/x.gguf", "not installed"),
        ("package:json/x.gguf", "no base"),
    ],
)
def test_source_that_is_not_there(source, text, tmp_path):
    with pytest.raises(UnsupportedModel, match=text):
        locate_base(source, cache=tmp_path)


def test_pickles_are_never_loaded(bases, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(bases["llama"], folder)
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=r"pytorch_model\.bin, and pickles are never loaded"):
        locate_base(str(folder), cache=tmp_path)


def test_code_of_a_model_folder_is_never_run(bases, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(bases["llama"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    with pytest.raises(UnsupportedModel, match="code of its own"):
        load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_quantized_base_is_refused(bases, tmp_path):
    folder = tmp_path / "quantized"
    shutil.copytree(bases["llama"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="quantized"):
        load_model(folder, dtype=torch.float32, device=torch.device("cpu"))


def test_hash_of_a_base_does_not_depend_on_its_shards_but_on_every_entry(bases, tmp_path):
    whole = base_sha256(bases["llama"])
    weights = load_file(bases["llama"] / "model.safetensors")
    names = sorted(weights)
    for part, chosen in (("a", names[::2]), ("b", names[1::2])):
        save_file({n: weights[n] for n in chosen}, tmp_path / f"model-{part}.safetensors")
    assert base_sha256(tmp_path) == whole
    changed = {n: weights[n].clone() for n in names[1::2]}
    changed[names[1]].view(-1)[0] += 1e-6
    save_file(changed, tmp_path / "model-b.safetensors")
    assert base_sha256(tmp_path) != whole


def test_inspect_tells_what_a_catalogue_needs(bases, tmp_path):
    facts = inspect(str(bases["gpt2"]), cache=tmp_path)
    assert (facts.max_length, facts.chat, facts.base_sha256) == (256, True, base_sha256(bases["gpt2"]))
    assert [(t.name, t.group, t.out_features, t.in_features, t.count) for t in facts.targets] == [
        ("c_attn", "attention", 96, 32, 2),
        ("attn.c_proj", "attention", 32, 32, 2),
        ("c_fc", "mlp", 128, 32, 2),
        ("mlp.c_proj", "mlp", 32, 128, 2),
    ]


def _fake_convert(path, out):
    (out / "config.json").write_text('{"model_type": "llama"}')
    (out / "model.safetensors").write_bytes(b"")
    (out / "who").write_text(multiprocessing.current_process().name)


def test_gguf_is_converted_once_and_the_losers_of_a_race_use_the_winners_folder(tmp_path, monkeypatch):
    file = tmp_path / "x.gguf"
    file.write_bytes(EMPTY_GGUF)
    cache = tmp_path / "cache"

    def lose(path, out):
        monkeypatch.setattr(module, "_convert", _fake_convert)
        locate_base(str(file), cache=cache)  # another worker finishes while we convert
        _fake_convert(path, out)

    monkeypatch.setattr(module, "_convert", lose)
    folder = locate_base(str(file), cache=cache).folder
    assert [p.name for p in cache.iterdir()] == [folder.name]
    monkeypatch.setattr(module, "_convert", None)
    assert locate_base(str(file), cache=cache).folder == folder


def test_failed_conversion_leaves_nothing_behind(tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(EMPTY_GGUF)
    with pytest.raises(UnsupportedModel, match=r"x\.gguf"):
        locate_base(str(file), cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_tokenizer_that_is_missing_is_a_clear_error(bases, tmp_path):
    shutil.copy(bases["llama"] / "config.json", tmp_path)
    with pytest.raises(UnsupportedModel, match="tokenizer"):
        load_tokenizer(tmp_path)
