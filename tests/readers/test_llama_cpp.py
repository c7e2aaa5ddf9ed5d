"""Downloads in llama.cpp, after the conversion that its users do."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.readers import gguf_files
from tests.readers.conftest import IDS, PLAIN, Download, ask
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
def by_llama_cpp(reader: str, download: Get, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Log-probabilities by the base ("base") and by every download, from one process."""
    folder = tmp_path_factory.mktemp("gguf")
    base, adapters = folder / "base.gguf", {}
    gguf_files.write_base(download("kaiming").base, base)
    for name in PLAIN:
        adapters[name] = str(folder / f"{name}.gguf")
        gguf_files.write_adapter(download(name).base, download(name).folder, Path(adapters[name]))
    asked = {"base": str(base), "adapters": adapters, "ids": IDS, "vocabulary": 320, "out": str(folder / "found.json")}
    ask(reader, "read_llama_cpp.py", asked)
    return {name: torch.tensor(values) for name, values in json.loads((folder / "found.json").read_text()).items()}


def test_base_is_the_base(by_llama_cpp: dict[str, torch.Tensor], download: Get) -> None:
    assert float((by_llama_cpp["base"] - logprobs(download("kaiming").untouched)).abs().max()) < NATS


@pytest.mark.parametrize("name", PLAIN)
def test_llama_cpp_reads_the_download_as_peft_does(
    name: str, by_llama_cpp: dict[str, torch.Tensor], download: Get
) -> None:
    one = download(name)
    moved = float((logprobs(one.expected) - logprobs(one.untouched)).abs().max())
    assert moved > 20 * NATS  # a wrong scale would show
    assert float((by_llama_cpp[name] - logprobs(one.expected)).abs().max()) < NATS
