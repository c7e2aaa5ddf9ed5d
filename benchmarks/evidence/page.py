"""docs/evidence.md, from what was measured so far."""

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from api.core.experiments import words
from api.core.experiments.ranking import Ranking, Row
from benchmarks.evidence import claims
from benchmarks.evidence.evidence import MIN_SEEDS, Evidence
from benchmarks.evidence.plan import BATCH, EVALUATIONS, MODEL, RANK, STEPS, Study
from benchmarks.evidence.replays import describe_replays
from benchmarks.evidence.rows import HELD_OUT_ROWS, TRAINING_ROWS
from benchmarks.evidence.verdicts import Said
from benchmarks.rates_rows import LONGEST

COMMAND = "make evidence DATA=folder"
PAGE_COMMAND = "python -m benchmarks.evidence --page-only"
REPLAY_COMMAND = "python -m benchmarks.evidence.replays"
CAPTIONS = {
    "order": "Every initialization at its own best learning rate",
    "rates": "Loss by learning rate, up to that of the untrained base; grey: kaiming",
    "curves": "Loss by step at the best learning rate; grey: kaiming",
    "cost": "Loss against the seconds of the initialization",
}


def make_page(evidence: Evidence, pictures: Sequence[str]) -> str:
    """The whole page. What was not measured yet is said to be missing."""
    blocks = [
        "# What the evidence says",
        _describe_state(evidence),
        "## What a user learns",
        _list(_learn(evidence)),
        "## Every initialization",
        *_tables(evidence),
        *[f"![{CAPTIONS[name]}](evidence/{name}.svg)\n\n{CAPTIONS[name]} (`{PAGE_COMMAND}`)." for name in pictures],
        "## The papers' claims",
        CLAIMS_HEAD,
        _list_claims(evidence),
        "## Would halving have kept the winner?",
        f"{describe_replays(evidence)} (`{REPLAY_COMMAND}`)",
        "## How it was measured",
        _describe_method(evidence),
        "## What is missing",
        _list(_missing(evidence)),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


CLAIMS_HEAD = (
    "Each treatment stands with its own best learning rate, as everywhere on this page. Intervals hold in 95 % of"
    " comparisons; of twenty comparisons one may be wrong. A claim that is not confirmed may hold elsewhere: with other"
    " data, a larger base or more steps."
)


def _list(lines: Sequence[str] | Iterator[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _describe_state(evidence: Evidence) -> str:
    done, planned = evidence.counts
    ended = [run.cell["finished_at"] for run in evidence.runs if run.cell["finished_at"]]
    last = f" The last one ended on {datetime.fromtimestamp(max(ended), UTC):%Y-%m-%d}." if ended else ""
    open_ones = [study.title for study in evidence.studies if not evidence.is_complete(study)]
    state = f"**{done} of {planned} cells are measured.**{last}"
    if open_ones:
        state += f" These experiments are incomplete, so their figures may change: {', '.join(open_ones)}."
    where = "[evidence](evidence)" if evidence.measured else "a folder beside it that is empty so far"
    return (
        "Here the service itself trains every initialization of Lorainit on real data, at several learning rates.\n"
        f"{' '.join([state, *evidence.differences])}\n"
        f"Everything on this page is written by `{COMMAND}` from the files in {where}."
    )


# --- what a user learns ----------------------------------------------------------------------------


def _learn(evidence: Evidence) -> list[str]:
    first = evidence.studies[0]
    known = [name for name in first.names if evidence.find(name) is not None]
    if len(known) < len(first.names):
        left = len(first.names) - len(known)
        return [
            f"Nothing certain yet: {left} of {len(first.names)} initializations lack {MIN_SEEDS} seeds at every rate,"
            " so the noise is not known.",
            *_learn_from_one_seed(evidence),
        ]
    ranking = evidence.rank([first.key])
    gap = claims.tuned_gap(evidence)
    names = {row.treatment: str(row.treatment) for row in ranking.rows}
    return [gap.why, *words.describe(ranking, names=names, curves=evidence.curves, baseline="kaiming")]


def _learn_from_one_seed(evidence: Evidence) -> Iterator[str]:
    """How far apart initializations lie at shared rates and at their own, once the first seed is complete."""
    first = evidence.studies[0]
    losses = {run.key: run.loss for run in evidence.runs if run.study == first.key}
    seed = first.seeds[0]
    if any((name, rate, seed) not in losses for name in first.names for rate in first.rates):
        return
    by_rate = {rate: [losses[name, rate, seed] or math.inf for name in first.names] for rate in first.rates}
    best = [min(values) for values in zip(*by_rate.values(), strict=True)]
    shared = ", ".join(f"{max(found) / min(found) - 1:.1%} at {rate:g}" for rate, found in by_rate.items())
    yield (
        f"Of one seed: at one learning rate for all, initializations lie within {shared}; each at the best of these"
        f" rates for it, within {max(best) / min(best) - 1:.1%}."
    )


# --- tables ----------------------------------------------------------------------------------------

COLUMNS = (
    "", "learning rate", "best loss ± deviation", "behind the best", "95 % interval", "kaiming's steps", "init s",
    "training s", "peak MB", "parameters", "download", "seeds", "failed",
)  # fmt: skip


def _tables(evidence: Evidence) -> Iterator[str]:
    first, *others = evidence.studies
    yield _table(evidence, evidence.rank([first.key]), [first])
    variants = [study for study in others if "quantization" not in study.lora]
    quantized = [study for study in others if "quantization" in study.lora]
    yield (
        "### Variants, beside kaiming and their own initialization without them\n\n"
        "The best is the best of all treatments in full precision, those of the table above included."
    )
    wanted = {"kaiming", *(name for study in variants for name in study.names)}
    wanted |= {init["method"] for study in variants for init in study.inits}
    yield _table(evidence, evidence.everything, variants, only=wanted)
    for study in quantized:
        yield f"### {study.title.capitalize()}"
        yield _table(evidence, evidence.rank([study.key]), [study])


def _table(evidence: Evidence, ranking: Ranking, studies: Sequence[Study], only: set[str] | None = None) -> str:
    if not any(study.key in evidence.measured and evidence.measured[study.key].cells for study in studies):
        return "Not measured yet."
    rows = [row for row in ranking.rows if only is None or row.treatment in only]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(_cells(evidence, row)) + " |" for row in rows]
    edges = [str(row.treatment) for row in rows if row.at_edge and row.summary is not None]
    note = f"\n\nThe best rate lies at the edge of what was tried for {', '.join(edges)}." if edges else ""
    return "\n".join(lines) + note


def _cells(evidence: Evidence, row: Row) -> list[str]:
    name, summary, difference = str(row.treatment), row.summary, row.difference
    interval = difference.family_ci95 if difference else None
    share, size = evidence.find_share(name, "kaiming"), evidence.find_fact(name, "adapter_bytes")
    peak, parameters = evidence.find_fact(name, "peak_memory_bytes"), evidence.find_fact(name, "trainable_parameters")
    download = f"{size / 1e6:.1f} MB, r {evidence.find_fact(name, 'export_rank')}" if size else ""
    spread = f" ± {summary.std:.4f}" if summary and summary.std is not None else ""
    return [
        f"{name}{' (tied)' if row.difference and row.tied_with_best and interval else ''}",
        "" if row.learning_rate is None else f"{row.learning_rate:g}",
        "" if summary is None else f"{summary.mean:.4f}{spread}",
        "" if difference is None else f"{difference.mean:.4f}",
        "" if interval is None else f"{interval.low:.4f} to {interval.high:.4f}",
        "" if share is None or name == "kaiming" else f"{share:.0%}",
        _number(evidence.find_seconds(name, "initializing")),
        _number(evidence.find_seconds(name, "training", "evaluating")),
        "" if peak is None else f"{peak / 1e6:.0f}",
        "" if parameters is None else f"{parameters:,}",
        download,
        str(summary.n if summary else 0),
        str(row.failed_runs or ""),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


# --- claims and replays ----------------------------------------------------------------------------


def _list_claims(evidence: Evidence) -> str:
    found = [(claim, claim.test(evidence)) for claim in claims.CLAIMS]
    counts = [(said, sum(verdict.said == said for _, verdict in found)) for said in Said]
    head = ", ".join(f"{count} {said}" for said, count in counts) + "."
    lines = ["| claim | from | | figures |", "|---|---|---|---|"]
    lines += [f"| {claim.text} | {claim.source} | **{verdict.said}** | {verdict.why} |" for claim, verdict in found]
    return head + "\n\n" + "\n".join(lines)


# --- how, and what is missing ----------------------------------------------------------------------


def _describe_method(evidence: Evidence) -> str:
    facts = [facts for found in evidence.measured.values() for facts in found.facts if facts["packages"]]
    where = sorted({found["machine"] for found in facts})
    versions = sorted({", ".join(f"{name} {one}" for name, one in found["packages"].items() if one) for found in facts})
    lines = [
        f"{MODEL}, bf16, r = {RANK}, all linear layers, AdamW, cosine, {STEPS} steps of {BATCH} rows, {EVALUATIONS}"
        " evaluations and one before step 1; scale and alpha as each method recommends.",
        f"{TRAINING_ROWS} training and {HELD_OUT_ROWS} held-out rows of GSM8K of at most {LONGEST} characters. A seed"
        " fixes the order of the rows.",
        "The length was chosen from the tokens per second of [speed.md](speed.md), so that a cell takes about 80"
        " seconds on two quiet cores, evaluations and the check of the download included. The table has what it took.",
        "The best of the evaluations counts. A rate was added where the best one lay at the edge of the grid.",
        "The ranking is the service's own ([how it decides](decisions/0073-what-counts-as-different.md)).",
    ]
    lines += [f"Machine: {one}." for one in where]
    lines += [f"Versions: {one}." for one in versions]
    if any(found.nice for found in evidence.measured.values()):
        lines.append(
            "It ran at low priority beside other programs. So seconds say how long runs took there, and not how fast a"
            " method is; [what an initialization costs](methods/benchmark.md) says that. Losses do not depend on it."
        )
    stopped = sum(run.cell["attempts"] > 1 for run in evidence.runs)
    if stopped:
        lines.append(f"{stopped} runs were interrupted and went on from a checkpoint; their seconds are left out.")
    return _list(lines)


def _missing(evidence: Evidence) -> Iterator[str]:
    for study in evidence.studies:
        if not evidence.is_complete(study):
            found = evidence.measured.get(study.key)
            done, total = (len(found.cells), found.total) if found else (0, study.planned)
            yield f"{study.title}: {done} of {total} cells."
    yield "Other data, larger bases, longer runs, several ranks: nothing here says whether the order is the same there."
    yield "Hyperparameters other than the learning rate were not tuned."
    yield "`auto` (initialization or rate chosen by the service) beside the best cell of the grid."
