"""What `make docs` writes is what stands in the documents, and says what the code does."""

import re
from pathlib import Path

import pytest
import torch

from api.core.db.tables import JOB_STATUSES
from docs.generate import errors, everything, methods, plots
from docs.generate.drawings import DRAWINGS
from docs.generate.marks import put
from lorainit.config.inits import INITS
from lorainit.config.rates import RATES

ROOT = Path(__file__).parents[2]
SECTIONS = {f"{page} {section}": (page, section, text) for page, section, text in everything.SECTIONS}


def read(page: str) -> str:
    """A page, which `make docs` begins if it is a method's."""
    assert (ROOT / page).exists(), f"{page} is not there: run `make docs`"
    return (ROOT / page).read_text()


@pytest.mark.parametrize("name", SECTIONS)
def test_a_generated_section_is_what_the_code_says(name: str) -> None:
    page, section, text = SECTIONS[name]
    written = read(page)
    assert put(written, section, text()) == written, "run `make docs`"


def test_a_page_that_is_not_there_is_told_with_the_command_that_begins_it() -> None:
    with pytest.raises(AssertionError, match=r"docs/methods/nothing\.md is not there: run `make docs`"):
        read("docs/methods/nothing.md")


def test_every_page_of_a_method_is_written_to_its_end() -> None:
    assert methods.find_unwritten(everything.METHODS) == []


def test_a_parameter_without_a_row_in_its_page_is_named_with_the_row_to_write() -> None:
    page = read("docs/methods/pissa.md")
    without = re.sub(r"^\| `niter` .*\n", "", page, flags=re.MULTILINE)
    assert methods._unwritten("pissa", without) == [
        "docs/methods/pissa.md has no row for `niter` under Parameters: write | `niter` | `16` | and what it means |."
    ]


def test_a_row_of_a_parameter_that_is_gone_is_named() -> None:
    page = read("docs/methods/pissa.md").replace("| `niter` |", "| `old` | `1` | Gone. |\n| `niter` |")
    assert methods._unwritten("pissa", page) == [
        "docs/methods/pissa.md has a row for `old`, which is no parameter of pissa: remove it."
    ]


def test_a_new_page_of_a_method_without_parameters_says_so_in_a_sentence() -> None:
    assert "\n\nThis method has no parameters of its own.\n\nEvery method has `seed`, too" in methods.page("kaiming")


def test_pictures_are_what_is_drawn_today_and_there_are_no_others() -> None:
    drawn = everything.pictures()
    assert set(everything.PICTURES.rglob("*.svg")) == drawn.keys()
    assert [path.name for path, text in drawn.items() if not everything.same_picture(path, text)] == [], (
        "run `make docs`"
    )


def test_a_picture_with_another_number_is_another_picture(tmp_path: Path) -> None:
    text = plots.picture("pissa")
    (tmp_path / "one.svg").write_text(text)
    assert everything.same_picture(tmp_path / "one.svg", text)
    (tmp_path / "one.svg").write_text(text.replace("‖A‖ = ", "‖A‖ = 1", 1))
    assert not everything.same_picture(tmp_path / "one.svg", text)
    (tmp_path / "one.svg").write_text(text.replace("PiSSA", "MiLoRA"))
    assert not everything.same_picture(tmp_path / "one.svg", text)


@pytest.mark.parametrize("name", ["pissa", "milora", "lora_ga", "lora_one", "loftq"])
def test_the_pictures_of_singular_directions_show_whole_directions(name: str) -> None:
    """Bars of 1 at the directions that the method takes, and of 0 elsewhere."""
    factors, _, _ = plots.start(name)
    found = plots._directions(name)
    for shares in (plots._share(factors.B, found.left), plots._share(factors.A.T, found.right)):
        assert sum(share > 0.99 for share in shares) == plots.RANK
        assert sum(shares) == pytest.approx(plots.RANK, abs=1e-2)


def test_the_layer_of_the_pictures_has_the_gradient_of_its_loss() -> None:
    """The loss ½·tr(D·C·Dᵀ), D = W - W*, against autograd."""
    small = plots.layer()
    G, C = small.evidence.gradient, small.evidence.second_moment
    assert G is not None
    assert C is not None
    D = torch.linalg.solve(C.double(), G.double(), left=False).requires_grad_()
    (0.5 * torch.trace(D @ C.double() @ D.T)).backward()
    assert D.grad is not None
    assert torch.allclose(D.grad, G.double(), rtol=0, atol=1e-6)


def test_the_picture_of_a_jobs_life_has_every_status() -> None:
    drawn = set(re.findall(r'<text [^>]*text-anchor="middle">(\w+)</text>', DRAWINGS["job"]().render()))
    assert drawn == {*JOB_STATUSES, "pausing"}


@pytest.mark.parametrize("picture", DRAWINGS)
def test_every_drawing_is_shown_on_a_page(picture: str) -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md")) + (ROOT / "README.md").read_text()
    assert f"pictures/{picture}.svg)" in pages


@pytest.mark.parametrize("name", INITS)
def test_a_methods_page_shows_its_picture_and_all_its_rates(name: str) -> None:
    page = read(f"docs/methods/{name}.md")
    assert f"](../pictures/methods/{name}.svg)" in page
    for row in (row for key, row in RATES.items() if key.split()[0] == name):
        assert f"| {' | '.join(f'{rate.value:g}' for rate in row)} |" in page


def test_a_code_without_a_meaning_is_named() -> None:
    with pytest.raises(ValueError, match=r"do(es)? not say what these codes mean: \['new_one'\]"):
        errors._require({"new_one": None}, {})
    with pytest.raises(ValueError, match=r"no longer exist: \['old_one'\]"):
        errors._require({}, {"old_one": "gone"})


def test_codes_of_rows_are_found_in_the_sources() -> None:
    found = set(errors._row_codes())
    assert {"mixed_formats", "invalid_utf8", "template_error", "few_rows", "no_stop_token"} <= found
