"""The kinds of claims: how a sentence of a paper is compared with what was measured."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from benchmarks.evidence.evidence import Comparison, Evidence


class Said(StrEnum):
    """What became of a claim, as the page says it."""

    CONFIRMED = "confirmed"
    NOT_CONFIRMED = "not confirmed"
    UNTESTABLE = "not testable here"
    UNMEASURED = "not measured yet"


MARGIN = 0.01  # of the loss: what counts as "matches", the smaller of the 1 to 2 % of arXiv 2602.04998


@dataclass(frozen=True)
class Verdict:
    """What became of a claim, and the figures that say so."""

    said: Said
    why: str


Test = Callable[[Evidence], Verdict]


def unmeasured(why: str = "Too few of its cells have ended.") -> Verdict:
    """There is not enough to judge."""
    return Verdict(Said.UNMEASURED, why)


def untestable(why: str) -> Test:
    """A claim that the service has no means to test."""
    return lambda _: Verdict(Said.UNTESTABLE, why)


def better(one: str, *others: str) -> Test:
    """`one` ends at a lower loss than each of the others, beyond noise."""

    def test(evidence: Evidence) -> Verdict:
        found = [evidence.compare(one, other) for other in others]
        known = [comparison for comparison in found if comparison is not None]
        if len(known) < len(found):
            return unmeasured()
        said = Said.CONFIRMED if all(comparison.better for comparison in known) else Said.NOT_CONFIRMED
        return Verdict(said, " ".join(map(describe, known)))

    return test


def matches(one: str, other: str) -> Test:
    """`one` is better than `other`, or the two differ by less than `MARGIN` of the loss, noise included."""

    def test(evidence: Evidence) -> Verdict:
        found, row = evidence.compare(one, other), evidence.find(other)
        if found is None or row is None or row.summary is None:
            return unmeasured()
        margin = MARGIN * row.summary.mean
        told = f"{describe(found)} What counts as equal is {margin:.3f}."
        return Verdict(Said.CONFIRMED if found.interval.low > -margin else Said.NOT_CONFIRMED, told)

    return test


def faster(one: str, other: str, *, share: float) -> Test:
    """`one` has `other`'s final loss after at most this share of its steps."""

    def test(evidence: Evidence) -> Verdict:
        comparison = evidence.compare(one, other)
        if comparison is None:
            return unmeasured()
        found = evidence.find_share(one, other)
        if found is None:
            return Verdict(Said.NOT_CONFIRMED, f"{one} does not reach {other}'s final loss with every seed.")
        told = f"{one} reaches {other}'s final loss in {found:.0%} of its steps."
        return Verdict(Said.CONFIRMED if found <= share else Said.NOT_CONFIRMED, told)

    return test


def describe(found: Comparison) -> str:
    """A comparison as a sentence."""
    low, high = found.interval.low, found.interval.high
    if found.better or found.worse:
        than = "lower" if found.better else "higher"
        interval = f"{_signed(low)} to {_signed(high)}"
        return f"{found.one} ends {abs(found.mean):.4f} nats {than} than {found.other} ({interval})."
    return (
        f"No difference beyond noise between {found.one} and {found.other}"
        f" ({_signed(found.mean)}, {_signed(low)} to {_signed(high)})."
    )


def _signed(value: float) -> str:
    return f"{value:+.4f}"
