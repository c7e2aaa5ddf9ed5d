"""A tokenizer and two tiny random models, made here: no hub, no download, no pretrained weights."""

import copy
import gc
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from lorainit.config.spec import RunSpec
from lorainit.export import early_check, fidelity

TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif -%}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{%- endfor %}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"
)
# No tools, and a system prompt of its own when the first message is none: SmolLM2's shape.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\nBe good"
    "<|im_end|>\n{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["system user assistant tool", "What is two and two? It is four, my friend.", "the the the cat sat"] * 3


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE with about 300 entries and ChatML control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=256
    )
    fast.chat_template = template
    return fast


def tiny_llama(hidden: int = 32, intermediate: int = 48, **more: int) -> LlamaForCausalLM:
    """Two layers, grouped-query attention, rectangular matrices throughout; `more` of its configuration."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{"num_hidden_layers": 2, **more},
    )
    return LlamaForCausalLM(config).eval()


def tiny_mistral(window: int) -> MistralForCausalLM:
    """Two layers in which a token sees itself and those before, `window` in all."""
    torch.manual_seed(2)
    config = MistralConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        sliding_window=window,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return MistralForCausalLM(config).eval()


def tiny_gpt2(hidden: int = 32) -> GPT2LMHeadModel:
    """Two layers of `Conv1D`, with dropout in its configuration as the real one."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=320,
        n_positions=256,
        n_embd=hidden,
        n_layer=2,
        n_head=4,
        initializer_range=0.15,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module", autouse=True)
def _loaded_modules_are_not_collected() -> None:
    """Keep from garbage collection what earlier files have loaded: to walk it took a sixth of a tiny run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """Folders of base models by name: `llama` (Linear) and `gpt2` (Conv1D), and both wide enough for NF4's blocks."""
    folders = {}
    makers = {
        "llama": tiny_llama,
        "gpt2": tiny_gpt2,
        "wide-llama": lambda: tiny_llama(64, 128),
        "wide-gpt2": lambda: tiny_gpt2(64),
    }
    for name, make in makers.items():
        folders[name] = tmp_path_factory.mktemp("base") / name
        make().save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def chat(question: str, answer: str, **extra) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **extra}]}


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve chat rows of different lengths."""
    words = ["the", "cat", "sat", "on", "two", "mats", "and", "it", "is", "four", "my", "friend", "so", "what"]
    made = [chat(f"What is {w}?", " ".join(words[: 2 + i])) for i, w in enumerate(words[:12])]
    return write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", made)


@pytest.fixture(scope="session")
def spec(bases: dict[str, Path], rows: Path):
    """Make a RunSpec from overrides: `spec("llama", lora={...}, training={...})`."""

    def make(base: str = "llama", **overrides) -> RunSpec:
        value = {
            "model": {"id": base, "source": str(bases[base]), "root": f"tests/{base}", "max_length": 256},
            "data": {"training": str(rows), "validation": None},
            "lora": {"init": "loram", "r": 4},
            "training": {"max_steps": 4, "batch_size": 5, "learning_rate": 1e-3, "checkpoint_interval": 2},
        }
        merged = copy.deepcopy(value)
        for key, override in overrides.items():
            merged[key] = merged[key] | override if isinstance(merged.get(key), dict) else override
        return RunSpec.model_validate(merged)

    return make


@pytest.fixture
def wanted(spec):
    """The same of a wider base, four rows to a step and to a pass."""
    return lambda **more: spec("wide-llama", **{"micro_batch_size": 4, "training": {"batch_size": 4}, **more})


@contextmanager
def no_early_check():
    """Runs in here do not try the adapter with stock PEFT before the first step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(early_check, "check_export_early", lambda *_, **__: None)
        yield


@contextmanager
def only_training():
    """Runs in here neither try PEFT before the first step nor measure how well a download can be served.

    That is half of a tiny run, and asked in tests/lorainit/export and by all tests without this. The download is
    still checked.
    """
    with no_early_check(), pytest.MonkeyPatch.context() as patch:
        measure_nothing(patch)
        yield


def measure_nothing(patch: pytest.MonkeyPatch) -> None:
    """Let runs not measure how well a download can be served: a third of a tiny run."""
    patch.setattr(fidelity, "choose_held_out", lambda *_: fidelity.HeldOut("training", []))


@pytest.fixture
def training_only():
    """`only_training` for a whole test, but not for what its fixtures of a wider scope run."""
    with only_training():
        yield


def change_json(path: Path, **values: object) -> None:
    """Write other values into a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def llama(bases: dict[str, Path], tmp_path: Path) -> Path:
    """A whole tiny Llama, to be spoiled."""
    return Path(shutil.copytree(bases["llama"], tmp_path / "spoiled"))
