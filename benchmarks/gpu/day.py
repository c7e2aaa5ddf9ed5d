"""What every section has: a device, a folder, a clock, and a voice. Also random bases of known shapes."""

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.outside import AGAIN, BEGUN
from benchmarks.gpu.plan import NOT_TRIED
from lorainit.data.dataset import Sample
from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import LoRALinear
from lorainit.model.layers.weight import shape_of
from lorainit.model.targets.targets import find_targets

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 320},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


@dataclass
class Day:
    """One section's device, scratch folder, deadline and page. `tiny`: small shapes and few cases.

    `earlier`: names of the cases that another process of this section began; what became of them stands on the page.
    """

    device: torch.device
    folder: Path
    tiny: bool
    until: float
    page: TextIO | None = None
    earlier: set[str] = field(default_factory=set)

    @classmethod
    def begun(cls, device: str, *, folder: Path, tiny: bool, seconds: float, page: TextIO | None = None) -> "Day":
        """The section begins no case shortly before it would be ended."""
        names = folder / BEGUN
        earlier = set(names.read_text().splitlines()) if names.exists() else set[str]()
        return cls(torch.device(device), folder, tiny, time.monotonic() + 0.85 * seconds, page, earlier)

    @property
    def has_gpu(self) -> bool:
        return self.device.type == "cuda"

    def say(self, text: str, *, end: str = "\n") -> None:
        """A part of the page; it is kept even if the section is ended later."""
        print(text, file=self.page or sys.stdout, end=end, flush=True)

    def attempt(self, name: str, work: Callable[[], str], *, line: str = "- {}: ", timed: bool = True) -> None:
        """One case as a line, which begins when the case does; one that fails is a line too, and the others go on."""
        if name in self.earlier:
            return
        if time.monotonic() > self.until:
            self.say(f"{line.format(name)}{NOT_TRIED} for lack of time")
            return
        self._note(name)
        self.say(line.format(name), end="")
        started, error = time.monotonic(), None
        try:
            found = work()
        except Exception as caught:
            traceback.print_exc()
            error, found = (
                caught,
                f"**{type(caught).__name__}: {' '.join(str(caught).split())[:240]}** ({place(caught)})",
            )
        self.say(f"{found} ({time.monotonic() - started:.1f} s)" if timed else found)
        if error is not None and "CUDA error" in str(error):
            sys.exit(AGAIN)  # from here on every call of this process would fail

    def _note(self, name: str) -> None:
        with (self.folder / BEGUN).open("a") as file:
            file.write(f"{name}\n")

    def wait(self) -> None:
        """For everything that the device has been asked for."""
        if self.has_gpu:
            torch.cuda.synchronize()


def place(error: BaseException) -> str:
    """The last line of the engine that an error came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/lorainit/" in f.filename]
    return (
        f"lorainit/{frames[-1].filename.split('/lorainit/')[-1]}:{frames[-1].lineno}" if frames else "not in the engine"
    )


def held(holds: bool, text: str) -> str:
    """`text`, in bold where it did not hold."""
    return text if holds else f"**{text}**"


def llama(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama of this shape with random weights, made on the device itself, frozen and in evaluation mode."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for weight in model.parameters():
        weight.normal_(0, 0.02, generator=generator) if weight.dim() > 1 else weight.fill_(1)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.tie_weights()
    model.config.use_cache = False
    return model


def adapters(model: Any, *, rank: int, device: torch.device) -> dict[str, LoRALinear]:
    """A LoRA on all linear layers, not attached yet."""
    made = {}
    for name, module in find_targets(model, "all-linear").items():
        out, n = shape_of(module)
        A, B = torch.randn(rank, n, device=device) * n**-0.5, torch.zeros(out, rank, device=device)
        made[name] = LoRALinear(module, Factors(A=A, B=B), scale=2.0, subtract=False)
    return made


def rows(count: int, length: int, vocabulary: int) -> list[Sample]:
    """Rows of one length, the last two thirds of each trained."""
    generator = torch.Generator().manual_seed(1)
    trained = torch.arange(length) >= length // 3
    ids = (torch.randint(vocabulary, (length,), generator=generator, dtype=torch.int32) for _ in range(count))
    return [Sample(line, row, trained) for line, row in enumerate(ids)]
