"""Any base that people bring: refused when it is looked at, or right. A cross-section here, the bulk in the slow tier.

Right means: loss and gradients of a step are those of stock eager attention and stock PEFT, row by row, and the
download says on an untouched base in another process what the trained model said.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.zoo.bases import KINDS
from tests.zoo.examine import examine
from tests.zoo.finding import CASES, ENGINE, INSPECT, REFUSALS, Case, Finding

# What is different in kind: rope that changes with the length, windows, experts, a state-space layer, Conv1D. A step of
# the engine or a whole job of each; in the slow tier both, and more.
CROSS_SECTION: dict[str, list[Case]] = {
    "phi3-longrope": [Case(ENGINE)],
    "qwen2": [Case(ENGINE, "bf16"), Case("hrp", "nf4")],
    "gemma2": [Case(ENGINE)],
    "opt": [Case("lora_one")],
    "mixtral": [Case("kaiming", "bf16")],
    "deepseek_v3": [Case(ENGINE)],
    "jamba": [Case(ENGINE)],
    "gemma4": [Case("kaiming", "bf16")],
    "falcon_h1": [Case("kaiming")],
}
REFUSED = ["bert", "bart", "t5", "qwen2_vl", "missing-mlp", "extra-weight", "missing-shard"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Case], Finding]:
    """The findings of the cross-section, whose downloads one process reads."""
    findings = examine(CROSS_SECTION, tmp_path_factory.mktemp("zoo") / "room")
    table = {(finding.kind, finding.case): finding for finding in findings}
    return lambda kind, case: table[kind, case]


@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT about architectures: a user's job goes on, too
@pytest.mark.parametrize(
    ("kind", "case"), [(kind, case) for kind, cases in CROSS_SECTION.items() for case in cases], ids=str
)
def test_the_job_is_what_stock_transformers_and_peft_make_of_it(found, kind, case):
    finding = found(kind, case)
    assert (finding.verdict, finding.sentence) == ("works", "")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_trained_is_refused_when_it_is_looked_at(kind: str, tmp_path: Path):
    (finding,) = examine({kind: [Case(INSPECT)]}, tmp_path)
    assert (finding.verdict, finding.code) == ("refused", "unsupported_model"), finding


def _bulk() -> list[tuple[str, list[Case]]]:
    return [
        (name, CASES if kind.expected == "trains" else REFUSALS) for name, kind in KINDS.items() if not kind.missing
    ]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "cases"), _bulk(), ids=[name for name, _ in _bulk()])
def test_every_kind_is_right_or_refused(kind: str, cases: list[Case], tmp_path: Path):
    wanted = {"trains": ("works", "refused"), "refused": ("refused",)}[KINDS[kind].expected]
    findings = examine({kind: cases}, tmp_path)
    assert [(str(f.case), f.verdict, f.sentence) for f in findings if f.verdict not in wanted] == []
