"""The tables of docs/models.md, made from findings; nothing in them is written by hand."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from tests.zoo.bases import KINDS
from tests.zoo.finding import INSPECT, PRECISIONS, Case, Finding

BEGIN, END = "<!-- zoo: begin -->", "<!-- zoo: end -->"
TITLES = {"dense": "Dense transformers", "mixture": "Mixtures of experts", "hybrid": "State-space and hybrid models",
          "vision": "Text and vision"}  # fmt: skip


def write(page: Path, findings: Sequence[Finding], *, stale: int) -> None:
    """Put the tables between the markers of the page; `stale`: how many kinds an older code was tried on."""
    text = page.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{tables(findings, stale)}\n{END}{after}")


def tables(findings: Sequence[Finding], stale: int) -> str:
    by_kind: dict[str, dict[Case, Finding]] = defaultdict(dict)
    for finding in findings:
        by_kind[finding.kind][finding.case] = finding
    trained = [kind for kind in by_kind if KINDS[kind].expected == "trains"]
    refused = [kind for kind in by_kind if KINDS[kind].expected == "refused"]
    parts = [_versions(len(by_kind), len(findings), stale)]
    for family, title in TITLES.items():
        if kinds := [kind for kind in trained if KINDS[kind].family == family]:
            parts.append(f"### {title}\n\n{_works(kinds, by_kind)}")
    if left_out := _left_out(trained, by_kind):
        parts.append(f"### Layers without a LoRA\n\n{left_out}")
    if exceptions := _exceptions(trained, by_kind):
        parts.append(f"### Exceptions\n\n{exceptions}")
    parts.append(f"### Refused\n\n{_refused(refused, by_kind)}")
    if missing := [f"- {name}: {kind.missing}." for name, kind in KINDS.items() if kind.missing]:
        parts.append("### Not tried\n\n" + "\n".join(missing))
    return "\n\n".join(parts) + "\n"


def _versions(kinds: int, cases: int, stale: int) -> str:
    names = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch"))
    older = f" {stale} kinds were tried with a slightly older state of the code." if stale else ""
    return f"{cases} cases of {kinds} kinds, with {names}, on a CPU.{older}"


def _works(kinds: Iterable[str], by_kind: dict[str, dict[Case, Finding]]) -> str:
    head = ["base", "what is special", "rows", *PRECISIONS, "of the weights"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for kind in kinds:
        found = by_kind[kind]
        cells = [f"`{kind}`", KINDS[kind].notes or "–", _fact(found, "rows")]
        lines.append(f"| {' | '.join([*cells, *(_cell(found, p) for p in PRECISIONS), _share(found)])} |")
    return "\n".join(lines)


def _cell(found: dict[Case, Finding], precision: str) -> str:
    """How many of the cases in this precision work."""
    tried = [f for case, f in found.items() if case.precision == precision and case.what != INSPECT]
    good = sum(f.verdict == "works" for f in tried)
    if good == len(tried):
        return "yes" if tried else "–"
    return f"{good} of {len(tried)}" if good else "no"


def _fact(found: dict[Case, Finding], name: str) -> str:
    values = {f.facts[name] for f in found.values() if name in f.facts}
    return ", ".join(sorted(values)) or "–"


def _share(found: dict[Case, Finding]) -> str:
    plain = found.get(Case("kaiming"))
    return f"{plain.numbers['share']:.0%}" if plain and "share" in plain.numbers else "–"


def _left_out(kinds: Iterable[str], by_kind: dict[str, dict[Case, Finding]]) -> str:
    """By reason, which layers of which kinds."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for kind in kinds:
        told = next((f.facts["left_out"] for f in by_kind[kind].values() if f.facts.get("left_out")), {})
        for name, reason in told.items():
            reasons[reason].append(f"`{name}` of `{kind}`")
    return "\n".join(f"- {_plain(reason)}: {', '.join(layers)}." for reason, layers in reasons.items())


def _exceptions(kinds: Iterable[str], by_kind: dict[str, dict[Case, Finding]]) -> str:
    """Everything that is not as it should be or was refused, cases with the same sentence together."""
    lines = []
    for kind in kinds:
        same: dict[tuple[str, str, str], list[Case]] = defaultdict(list)
        for case, finding in by_kind[kind].items():
            if finding.verdict != "works":
                same[finding.verdict, finding.code, finding.sentence].append(case)
        for (verdict, code, sentence), cases in same.items():
            which = ", ".join(str(case) for case in cases)
            lines.append(f"- `{kind}`, {which}: {_word(verdict, code)}: {_plain(sentence)}")
    return "\n".join(lines)


def _word(verdict: str, code: str) -> str:
    words = {"refused": f"refused (`{code}`)", "late": f"**refused after training** (`{code}`)"}
    return words.get(verdict, f"**{verdict}**")


def _plain(sentence: str) -> str:
    sentence = re.sub(r"/\S*/zoo/", "", sentence)  # where the folder happened to lie
    return " ".join(sentence.split()).replace("|", "\\|").replace("<", "‹").replace(">", "›")[:300]


def _refused(kinds: Iterable[str], by_kind: dict[str, dict[Case, Finding]]) -> str:
    lines = ["| base | what it is | when it is looked at | what a job on it ends with |", "|---|---|---|---|"]
    for kind in kinds:
        found = by_kind[kind]
        cells = [_verdict(found.get(Case(INSPECT))), _verdict(found.get(Case("kaiming")))]
        cells[1] = "the same" if cells[1] == cells[0] else cells[1]
        lines.append(f"| `{kind}` | {KINDS[kind].notes} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(finding: Finding | None) -> str:
    if finding is None:
        return "–"
    word = f"`{finding.code}`" if finding.verdict == "refused" else _word(finding.verdict, finding.code)
    return f"{word}: {_plain(finding.sentence)}" if finding.sentence else word
