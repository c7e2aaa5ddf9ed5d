"""docs/architecture.md says which files a row passes on its way to its loss."""

import re
from pathlib import Path

from tests.lorainit.walk import walk

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"


def test_a_row_passes_the_files_that_the_document_lists(spec, tmp_path):
    text = PAGE.read_text().partition("### From a row to its loss")[2].partition("\n### ")[0]
    listed = re.findall(r"^\d+\. `lorainit/([a-z_/]+\.py)`", text, re.MULTILINE)
    assert list(walk(spec(), tmp_path / "out")) == listed
