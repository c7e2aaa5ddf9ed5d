"""A base that is a GGUF file, as a user has one: inspected, served, trained, downloaded, loaded as its card says."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.api.cli.conftest import lorainit, serving
from tests.lorainit.conftest import write_rows
from tests.readers import gguf_files


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("root", [None, "Lab/Tiny"])
def test_a_job_on_a_gguf_file_is_what_its_card_says(tiny: Path, root: str | None, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shop, elsewhere = tmp_path / "shop", tmp_path / "elsewhere"
    shop.mkdir()
    elsewhere.mkdir()
    gguf_files.write_base(tiny, shop / "tiny.gguf")
    # The file has no chat template.
    pairs = [{"prompt": f"What is {n}? ", "completion": f"It is {n} and {n}"} for n in range(16)]
    rows = write_rows(shop / "rows.jsonl", pairs)
    named = ["--root", root] if root else []
    entry = lorainit("models", "inspect", "tiny.gguf", "--id", "mine", *named, cwd=shop)
    assert entry.returncode == 0, entry.stderr
    (shop / "models.toml").write_text(entry.stdout)
    with serving(tmp_path / "state", LORAINIT_CATALOGUE=str(shop / "models.toml")) as served:
        sent = served.run_alone("submit", str(rows), "--model", "mine", "--init", "lora_one", "--watch", cwd=elsewhere)
        assert sent.returncode in (0, 3), sent.stderr
        assert served.run_alone("download", sent.stdout.split()[0], cwd=elsewhere).returncode == 0

    (adapter,) = (path.parent for path in elsewhere.glob("*/adapter_config.json"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == (root or "local:tiny")
    card = (adapter / "README.md").read_text()
    folder = {"path/to/the/folder/of/the/file": str(shop), "path/to/this/folder": str(adapter)}
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    text = code[1]
    for said, meant in folder.items():
        text = text.replace(said, meant)
    found: dict[str, PeftModel] = {}
    exec(text, found)
    (converted,) = (tmp_path / "state" / "models").glob("tiny-*")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(converted), str(adapter))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(found["model"](ids).logits, expected(ids).logits)
        assert not torch.equal(found["model"](ids).logits, AutoModelForCausalLM.from_pretrained(converted)(ids).logits)
