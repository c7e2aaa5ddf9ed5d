"""Names of layers: as short as they can be, read the same everywhere, and folded into few words."""

import pytest

from lorainit.config.paths import collapse_names, expand_names, matches
from lorainit.model.targets.names import short_names


def test_names_are_as_short_as_they_can_be_and_never_mean_another_module():
    kinds = {"h.0.attn.c_proj": "a", "h.1.attn.c_proj": "a", "h.0.mlp.c_proj": "m", "h.0.mlp.c_fc": "m", "x.0": "m"}
    found = short_names(kinds, {"h", "h.0", "h.1", "h.0.attn", "x"})
    assert set(found.values()) == {"attn.c_proj", "mlp.c_proj", "c_fc", "x.*"}
    mixed = short_names({"h.0.p": "a", "h.1.p": "b"}, set())
    assert mixed == {"h.0.p": "h.0.p", "h.1.p": "h.1.p"}


@pytest.mark.parametrize(
    ("wanted", "means_it"),
    [("q_proj", True), ("attn.q_proj", True), ("layers.3.attn.q_proj", True), ("layers.*.attn.q_proj", True),
     ("_proj", False), ("layers.*.q_proj", False), ("layers.4.attn.q_proj", False), ("*.layers.3.attn.q_proj", False)],
)  # fmt: skip
def test_what_an_end_of_a_name_means(wanted, means_it):
    assert matches("model.layers.3.attn.q_proj", wanted) is means_it


@pytest.mark.parametrize(
    ("paths", "few"),
    [(["m.0.q", "m.1.q", "m.2.q"], ["m.0-2.q"]), (["m.0.q", "m.2.q", "m.3.q"], ["m.0,2-3.q"]), (["q"], ["q"]),
     (["m.1.q", "m.1.x.0", "m.1.x.1", "m.3.x.0", "m.3.x.1"], ["m.1.q", "m.1,3.x.0-1"]),
     (["m.0.x.0", "m.1.x.0", "m.1.x.1"], ["m.0.x.0", "m.1.x.0-1"])],
)  # fmt: skip
def test_full_names_are_folded_and_unfolded(paths, few):
    assert collapse_names(paths) == few
    assert sorted(path for one in few for path in expand_names(one)) == sorted(paths)
