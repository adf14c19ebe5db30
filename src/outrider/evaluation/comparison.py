"""The figures of an evaluation, computed from the rounds and seconds of each prompt.

acceptance length   committed tokens per round, the bonus token included; without it: accepted drafts per round
conditional         P(draft j accepted | drafts 1..j-1 were), over the rounds that verified j drafts
cumulative          P(drafts 1..j all accepted), over the same
verify rate         verified drafts over drafted ones; below 1 where a policy truncates drafts
acceptance rate     accepted drafts over verified ones

n prompts of a domain, K positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outrider.evaluation.intervals import Estimate, Picks, estimate, macro, share
from outrider.evaluation.recording import Round, observed
from outrider.scheduling import calibration

__all__ = [
    "MACRO",
    "Confidence",
    "Counts",
    "Difference",
    "Evaluation",
    "Row",
    "Sample",
    "Samples",
    "SweepPoint",
    "confidence_of",
    "difference_of",
    "row_of",
]

MACRO = "macro average"


@dataclass(frozen=True, slots=True)
class Sample:
    """One side's answers to one prompt, all repeats together. A side is a drafter or plain decoding."""

    tokens: int
    seconds: float
    rounds: list[Round]

    def __add__(self, other: Sample) -> Sample:
        return Sample(self.tokens + other.tokens, self.seconds + other.seconds, self.rounds + other.rounds)


Samples = dict[str, list[Sample]]
"""By side; prompts in order."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of one drafter in one domain: [n] each, by prompt."""

    rounds: NDArray[np.int64]
    committed: NDArray[np.int64]
    drafted: NDArray[np.int64]
    verified: NDArray[np.int64]
    accepted: NDArray[np.int64]
    offered: NDArray[np.int64]  # [K, n]   rounds that verified draft j
    reached: NDArray[np.int64]  # [K, n]   of these, rounds that accepted all drafts before j
    accepted_at: NDArray[np.int64]  # [K, n]  of these, rounds that accepted draft j
    tokens: NDArray[np.int64]
    seconds: NDArray[np.float64]
    plain_tokens: NDArray[np.int64]
    plain_seconds: NDArray[np.float64]

    @staticmethod
    def of(samples: Sequence[Sample], plain: Sequence[Sample], depth: int) -> Counts:
        """``depth``: positions K."""

        def count(number: Callable[[Round], int]) -> NDArray[np.int64]:
            return np.array([sum(map(number, sample.rounds)) for sample in samples])

        def positions(number: Callable[[Round, int], bool]) -> NDArray[np.int64]:
            each = [count(lambda r, j=j: number(r, j)) for j in range(depth)]  # type: ignore[misc]
            return np.array(each, dtype=np.int64).reshape(depth, len(samples))

        return Counts(
            rounds=count(lambda r: 1),
            committed=count(lambda r: r.committed),
            drafted=count(lambda r: r.drafted),
            verified=count(lambda r: r.verified),
            accepted=count(lambda r: r.accepted),
            offered=positions(lambda r, j: r.verified > j),
            reached=positions(lambda r, j: r.verified > j and r.accepted >= j),
            accepted_at=positions(lambda r, j: r.accepted > j),
            tokens=np.array([s.tokens for s in samples]),
            seconds=np.array([s.seconds for s in samples]),
            plain_tokens=np.array([s.tokens for s in plain]),
            plain_seconds=np.array([s.seconds for s in plain]),
        )

    def length(self, picks: Picks) -> NDArray[np.float64]:
        """Acceptance length, the bonus token included."""
        return share(self.committed, self.rounds, picks)

    def speedup(self, picks: Picks) -> NDArray[np.float64]:
        return share(self.tokens, self.seconds, picks) / share(self.plain_tokens, self.plain_seconds, picks)


@dataclass(frozen=True, slots=True)
class Row:
    """One drafter in one domain, or over all of them."""

    drafter: str
    temperature: float
    domain: str
    prompts: int
    rounds: int
    acceptance_length: Estimate
    without_bonus: Estimate
    verify_rate: Estimate
    acceptance_rate: Estimate
    tokens_per_second: Estimate
    plain_tokens_per_second: Estimate
    speedup: Estimate
    conditional: list[Estimate]
    cumulative: list[Estimate]


@dataclass(frozen=True, slots=True)
class Difference:
    """Acceptance length of one drafter minus another's, on the same prompts."""

    drafter: str
    other: str
    temperature: float
    domain: str
    acceptance_length: Estimate


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One drafter whose drafts are truncated at the first confidence under a threshold, over all domains."""

    drafter: str
    temperature: float
    threshold: float
    acceptance_length: Estimate
    verify_rate: Estimate
    acceptance_rate: Estimate
    speedup: Estimate


@dataclass(frozen=True, slots=True)
class Confidence:
    """How well one drafter's survivals agree with acceptance, at each position and pooled over positions."""

    drafter: str
    temperature: float
    pooled: calibration.Quality
    positions: list[calibration.Quality]
    predicted: list[float]
    observed: list[float]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All results of an evaluation."""

    facts: dict[str, Any]
    rows: list[Row]
    differences: list[Difference]
    sweep: list[SweepPoint]
    confidences: list[Confidence]
    errors: list[dict[str, Any]] = field(default_factory=list)
    """Prompts that could not be answered: file, index (from 0), line (from 1), error."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def row_of(name: str, temperature: float, domain: str, counts: Sequence[Counts], draws: int) -> Row:
    """The figures of one drafter; ``counts`` holds one entry per domain."""
    sizes = [len(one.rounds) for one in counts]

    def of(figure: Callable[[Counts, Picks], NDArray[np.float64]]) -> Estimate:
        return estimate(sizes, macro([lambda picks, c=c: figure(c, picks) for c in counts]), draws)  # type: ignore[misc]

    depth = len(counts[0].offered)
    return Row(
        drafter=name,
        temperature=temperature,
        domain=domain,
        prompts=sum(sizes),
        rounds=int(sum(one.rounds.sum() for one in counts)),
        acceptance_length=of(Counts.length),
        without_bonus=of(lambda c, p: share(c.accepted, c.rounds, p)),
        verify_rate=of(lambda c, p: share(c.verified, c.drafted, p)),
        acceptance_rate=of(lambda c, p: share(c.accepted, c.verified, p)),
        tokens_per_second=of(lambda c, p: share(c.tokens, c.seconds, p)),
        plain_tokens_per_second=of(lambda c, p: share(c.plain_tokens, c.plain_seconds, p)),
        speedup=of(Counts.speedup),
        conditional=[of(lambda c, p, j=j: share(c.accepted_at[j], c.reached[j], p)) for j in range(depth)],  # type: ignore[misc]
        cumulative=[of(lambda c, p, j=j: share(c.accepted_at[j], c.offered[j], p)) for j in range(depth)],  # type: ignore[misc]
    )


def difference_of(
    pair: tuple[str, str], temperature: float, domain: str, counts: Sequence[tuple[Counts, Counts]], draws: int
) -> Difference:
    statistic = macro([lambda picks, a=a, b=b: a.length(picks) - b.length(picks) for a, b in counts])  # type: ignore[misc]
    return Difference(*pair, temperature, domain, estimate([len(a.rounds) for a, _ in counts], statistic, draws))


def confidence_of(name: str, temperature: float, rounds: Sequence[Round]) -> Confidence | None:
    seen = observed(rounds)
    if len(seen.verified) < calibration.BINS:
        return None
    probabilities, outcomes = calibration.pooled(*seen)
    curve = calibration.reliability(probabilities, outcomes)
    return Confidence(
        name,
        temperature,
        calibration.quality(probabilities, outcomes),
        calibration.survival_quality(*seen),
        curve.predicted.tolist(),
        curve.observed.tolist(),
    )
