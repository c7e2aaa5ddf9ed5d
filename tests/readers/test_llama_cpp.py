"""Downloads in llama.cpp, after the conversion that its users do."""

import json
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.readers import gguf_files
from tests.readers.conftest import IDS, PLAIN, Download, ask, same_tier, slowly
from tests.readers.environments import python_of

# The first test trains the downloads and may have to make an environment.
pytestmark = pytest.mark.timeout(1200)
NATS = 0.02
Get = Callable[[str], Download]


def logprobs(logits: torch.Tensor) -> torch.Tensor:
    """Of each next token of `IDS`."""
    rows = torch.log_softmax(logits.double(), dim=-1)[:-1]
    return rows.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


@pytest.fixture(scope="module")
def reader() -> str:
    """llama.cpp's environment; the binding is a third party's and its releases may go."""
    try:
        python_of("llama-cpp")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the package index has no llama.cpp for this machine: {error}")
    return "llama-cpp"


@pytest.fixture(scope="module")
def by_llama_cpp(
    reader: str, download: Get, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, torch.Tensor]]:
    """Log-probabilities by the base ("base") and by the downloads of a case's tier, from one process."""

    @cache
    def read(*names: str) -> dict[str, torch.Tensor]:
        folder = tmp_path_factory.mktemp("gguf")
        base, adapters = folder / "base.gguf", {}
        gguf_files.write_base(download("kaiming").base, base)
        for name in names:
            adapters[name] = str(folder / f"{name}.gguf")
            gguf_files.write_adapter(download(name).base, download(name).folder, Path(adapters[name]))
        out = folder / "found.json"
        asked = {"base": str(base), "adapters": adapters, "ids": IDS, "vocabulary": 320, "out": str(out)}
        ask(reader, "read_llama_cpp.py", asked)
        return {name: torch.tensor(values) for name, values in json.loads(out.read_text()).items()}

    return lambda name: read(*same_tier(name, PLAIN))


Read = Callable[[str], dict[str, torch.Tensor]]


def test_base_is_the_base(by_llama_cpp: Read, download: Get) -> None:
    found = by_llama_cpp("kaiming")["base"]
    assert float((found - logprobs(download("kaiming").untouched)).abs().max()) < NATS


@pytest.mark.parametrize("name", slowly(PLAIN))
def test_llama_cpp_reads_the_download_as_peft_does(name: str, by_llama_cpp: Read, download: Get) -> None:
    one = download(name)
    moved = float((logprobs(one.expected) - logprobs(one.untouched)).abs().max())
    assert moved > 20 * NATS  # a wrong scale would show
    assert float((by_llama_cpp(name)[name] - logprobs(one.expected)).abs().max()) < NATS
