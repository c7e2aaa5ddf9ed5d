"""What `lorainit models inspect` prints is an entry that the catalogue reads."""

import tomllib

from api.cli.tables import format_catalogue_entry
from api.core.models import catalogue
from lorainit.config.model_facts import ModelFacts, Target
from lorainit.model.inspect import inspect
from tests.zoo.bases import make


def test_the_printed_entry_is_a_catalogue_entry(tmp_path):
    folder = make("qwen2_moe", tmp_path / "base")
    facts = inspect(str(folder), cache=tmp_path)
    path = tmp_path / "models.toml"
    path.write_text(format_catalogue_entry(facts, model_id="moe", given=False))
    entry = catalogue.load(path)["moe"]
    assert (entry.targets, entry.left_out) == (facts.targets, facts.left_out)
    assert "shared_expert_gate" in path.read_text()


def test_the_printed_entry_says_every_letter_of_a_path_as_toml_does():
    path = '/bases/emoji \U0001f642 \x7f "quoted" \\ ü'
    layer = Target(name="q_proj", group="attention", out_features=8, in_features=8, count=1)
    facts = ModelFacts(root="local:x", source=path, max_length=8, chat=False, targets=[layer])
    assert tomllib.loads(format_catalogue_entry(facts, model_id="x", given=True))["models"][0]["source"] == path
