"""What the papers claim of each initialization, and how each claim is tested here."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.evidence.evidence import Evidence
from benchmarks.evidence.plan import RATES
from benchmarks.evidence.verdicts import (
    Said,
    Test,
    Verdict,
    better,
    describe,
    faster,
    matches,
    unmeasured,
    untestable,
)

SMALL_GAP = 0.02  # arXiv 2602.04998: within 1 to 2 % once rates are tuned
WELL, ILL = "lora_ga", ("pissa", "lora_one")  # starts with orthonormal factors, and with unequal singular values


@dataclass(frozen=True)
class Claim:
    """A sentence, where it is from, and the test."""

    text: str
    source: str
    test: Test


def tuned_gap(evidence: Evidence) -> Verdict:
    """All initializations end close together at their own best rates."""
    study = evidence.studies[0]
    rows = [evidence.find(name) for name in study.names]
    means = {str(row.treatment): row.summary.mean for row in rows if row is not None and row.summary is not None}
    if len(means) < len(study.names):
        return unmeasured()
    best, worst = min(means, key=lambda name: means[name]), max(means, key=lambda name: means[name])
    gap = means[worst] / means[best] - 1
    said = Said.CONFIRMED if gap <= SMALL_GAP else Said.NOT_CONFIRMED
    ends = f"from {best} ({means[best]:.4f}) to {worst} ({means[worst]:.4f})"
    told = f"At their own best rates initializations lie within {gap:.1%}, {ends}."
    return Verdict(said, f"{told} {describe_shared_gaps(evidence)}")


def describe_shared_gaps(evidence: Evidence) -> str:
    """How far apart initializations lie at one rate for all."""
    found = []
    for rate in RATES:
        means = _means_at(evidence, rate)
        if len(means) == len(evidence.studies[0].names):
            found.append(f"{max(means) / min(means) - 1:.1%} at {rate:g}")
    return f"At one rate for all: {', '.join(found)}." if found else ""


def _means_at(evidence: Evidence, rate: float) -> list[float]:
    rows = (evidence.find(name) for name in evidence.studies[0].names)
    summaries = [row.by_rate.get(rate) for row in rows if row is not None]
    return [summary.mean for summary in summaries if summary is not None]


def ahead_at_start(evidence: Evidence) -> Verdict:
    """LoRA-One's loss before step 1 is lower than that of LoRA-GA, which starts as the base."""
    one, other, noise = evidence.find_start("lora_one"), evidence.find_start("lora_ga"), evidence.everything.noise
    if one is None or other is None or noise is None:
        return unmeasured()
    said = Said.CONFIRMED if other - one > noise.deviation else Said.NOT_CONFIRMED
    return Verdict(said, f"Before step 1: lora_one {one:.4f}, lora_ga {other:.4f}.")


def equal_magnitude(evidence: Evidence) -> Verdict:
    """Runs whose update is equally large have the same curve, and those with a smaller one have not."""
    reference, changed = "orthogonal + no clipping", "orthogonal (divisor 20.0) + no clipping"
    equal = _distance(evidence, reference, f"{changed}, alpha x 4, rates / 2", factor=0.5)
    unequal, noise = _distance(evidence, reference, changed, factor=1.0), evidence.everything.noise
    if equal is None or unequal is None or noise is None:
        return unmeasured()
    said = Said.CONFIRMED if equal <= noise.deviation < unequal else Said.NOT_CONFIRMED
    return Verdict(
        said,
        f"Factors half as large, alpha four times and the rate half as large: the curves are {equal:.4f} nats apart on"
        f" average. Smaller factors alone: {unequal:.4f}. The noise between seeds is {noise.deviation:.4f}.",
    )


def _distance(evidence: Evidence, one: str, other: str, *, factor: float) -> float | None:
    """The mean distance of the curves of two treatments whose rates differ by a factor; None if some are missing."""
    mine = {key: curve for key, curve in evidence.curves.items() if key[0] == one}
    pairs = [
        (curve, evidence.curves.get((other, (rate or 0.0) * factor, seed))) for (_, rate, seed), curve in mine.items()
    ]
    planned = sum(study.planned for study in evidence.studies if one in study.names)
    if not mine or len(mine) < planned or any(second is None for _, second in pairs):
        return None
    return fmean(
        abs(a["valid_loss"] - b["valid_loss"])
        for first, second in pairs
        for a, b in zip(first, second or (), strict=True)
    )


def conditioning(evidence: Evidence) -> Verdict:
    """What ill-conditioned starts lose against a well-conditioned one is smaller with the preconditioner."""
    plain = [evidence.compare(name, WELL) for name in ILL]
    treated = [evidence.compare(f"{name} + preconditioned", f"{WELL} + preconditioned") for name in ILL]
    known = [one for one in (*plain, *treated) if one is not None]
    if len(known) < len(plain) + len(treated):
        return unmeasured()
    before, after = known[: len(ILL)], known[len(ILL) :]
    if not any(one.worse for one in before):
        return Verdict(Said.NOT_CONFIRMED, f"There is nothing to remove: {' '.join(map(describe, before))}")
    said = Said.CONFIRMED if not any(one.worse for one in after) else Said.NOT_CONFIRMED
    return Verdict(said, f"Without: {' '.join(map(describe, before))} With: {' '.join(map(describe, after))}")


def four_bits(evidence: Evidence) -> Verdict:
    """LoftQ ends lower than LoRA on the same base in four bits."""
    ranking = evidence.rank(["four-bits"])
    found = evidence.compare("loftq + nf4", "kaiming + nf4", ranking)
    return (
        unmeasured()
        if found is None
        else Verdict(Said.CONFIRMED if found.better else Said.NOT_CONFIRMED, describe(found))
    )


CLAIMS: Sequence[Claim] = (
    Claim("Once each has its own rate, initializations end within 1 to 2 %.", "arXiv 2602.04998", tuned_gap),
    Claim("LoRAM matches PiSSA without an SVD.", "arXiv 2507.06558", matches("loram", "pissa")),
    Claim(
        "LoRAM's sine basis is better than random orthonormal or Gaussian vectors of equal magnitude.",
        "arXiv 2507.06558, ablation",
        better("loram", "loram (basis random orthogonal)", "loram (basis gaussian)"),
    ),
    Claim(
        "Rate, alpha and the size of the start can be changed against each other without changing the curve.",
        "arXiv 2507.06558, proposition 1",
        equal_magnitude,
    ),
    Claim(
        "The growth of the update follows from its magnitude at the start.",
        "arXiv 2507.06558, proposition 2",
        untestable("The service reports losses of a run, and not the size of its update at each step."),
    ),
    Claim("LoRA-One is ahead before the first step.", "arXiv 2502.01235", ahead_at_start),
    Claim("LoRA-One ends better than LoRA-GA.", "arXiv 2502.01235", better("lora_one", "lora_ga")),
    Claim("Preconditioning removes the dependence on conditioning.", "arXiv 2502.01235", conditioning),
    Claim("Preconditioning improves plain LoRA.", "arXiv 2402.02347", better("kaiming + preconditioned", "kaiming")),
    Claim("HRP is better than a random start.", "arXiv 2502.07739", better("hrp", "kaiming")),
    Claim(
        "HRP gains with the rank of its preheating (128 here, against 16 and 32).",
        "arXiv 2502.07739",
        better("hrp", "hrp (preheat rank 16)", "hrp (preheat rank 32)"),
    ),
    Claim("PiSSA ends better than LoRA.", "arXiv 2404.02948", better("pissa", "kaiming")),
    Claim("MiLoRA ends better than LoRA and PiSSA.", "arXiv 2406.09044", better("milora", "kaiming", "pissa")),
    Claim("OLoRA converges faster than LoRA.", "arXiv 2406.01775", faster("olora", "kaiming", share=0.99)),
    Claim("LoRA-GA needs half of LoRA's steps or fewer.", "arXiv 2407.05000", faster("lora_ga", "kaiming", share=0.5)),
    Claim("EVA ends better than LoRA.", "arXiv 2410.07170", better("eva", "kaiming")),
    Claim("CorDA ends better than LoRA.", "arXiv 2406.05223", better("corda", "kaiming")),
    Claim("rsLoRA's scale is better than alpha/r.", "arXiv 2312.03732", better("kaiming + rsLoRA", "kaiming")),
    Claim("DoRA ends better than LoRA.", "arXiv 2402.09353", better("kaiming + DoRA", "kaiming")),
    Claim("LoRA+ ends better than LoRA.", "arXiv 2402.12354", better("kaiming + LoRA+", "kaiming")),
    Claim("On a base in four bits, LoftQ ends better than LoRA.", "arXiv 2310.08659", four_bits),
    Claim(
        "Published gains in the accuracy of answers.",
        "all papers",
        untestable("The service compares losses and generates no answers."),
    ),
    Claim(
        "Lorainit reaches the loss of TRL's defaults in a third of the seconds.",
        "our goal",
        lambda _: unmeasured("It needs TRL beside it, in the same run of `make bench-train`."),
    ),
)
