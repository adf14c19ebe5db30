"""Calibration of confidences against what verification accepted: its error, and the scaling that corrects it.

A confidence c_j says P(draft j accepted | drafts 1..j-1 were). What a scheduler spends its budget by is the survival
a_j = prod_{i<=j} c_i = P(drafts 1..j all accepted), in which small errors multiply.

Sequential temperature scaling (STS; DSpark's confidence calibration, after Guo et al. 2017, arXiv 1706.04599, section
4.2) therefore fits positions from left to right: T_j is the temperature of a grid for which the survival
prod_{i<=j} sigmoid(z_i / T_i) has the least expected calibration error against "drafts 1..j all accepted", with
T_1..T_{j-1} as they were found before. So position j may make good what is left of the errors before it.

A temperature keeps the sign of a logit: it can make a head bolder or humbler where it was trained to speak of
acceptance, but a head in another bucket than its own, or a signal that was never meant as a probability (a margin is
at least 0, so its sigmoid at least one half), also needs a ``shift``: z / T_j + b_j (Platt 1999), b_j being the one
that makes the mean survival right for that T_j.

n rounds, K positions. Rounds that verified fewer than j drafts say nothing of position j. Computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from outrider.config import SamplingParams
from outrider.core import native
from outrider.errors import CheckpointError
from outrider.types import Context, CoreScaling, Proposal

__all__ = [
    "BINS",
    "ENOUGH",
    "FILE",
    "GRID",
    "Calibration",
    "Quality",
    "Reliability",
    "Scaling",
    "area_under_curve",
    "brier",
    "calibration_error",
    "conditional_quality",
    "error_of_chance",
    "fit",
    "log_loss",
    "logit",
    "logits_of",
    "pooled",
    "quality",
    "reliability",
    "sigmoid",
    "survival_quality",
]

FILE = "calibration.json"
"""Its name in a drafter's directory."""
BINS = 15
GRID = tuple(10 ** (k / 40 - 1) for k in range(101))
"""Temperatures tried: 0.1 to 32, each 6 % above the one before."""
ENOUGH = 0.01
"""Calibration error of a position that no shift is fitted for."""
DRAWS = 40  # sets of outcomes that an error of chance is the mean of
LARGEST_LOGIT = 14.0  # beyond it a float32 sigmoid rounds to 0 or 1
REMEMBERED = 64  # buckets of requests whose scaling is kept at hand
FORMAT, VERSION = "outrider-calibration", 1


# ------------------------------------------------------------------------------------------------ measures


@dataclass(frozen=True, slots=True)
class Reliability:
    """Bins of equal mass, from the smallest probability to the largest."""

    predicted: Tensor  # float64 [bins]   mean probability
    observed: Tensor  # float64 [bins]    share of outcomes that came true
    counts: Tensor  # int64 [bins]

    @property
    def error(self) -> float:
        """Expected calibration error: the gap between the two, averaged over all that was predicted."""
        return float(((self.predicted - self.observed).abs() * self.counts).sum() / self.counts.sum())


def reliability(probabilities: Tensor, outcomes: Tensor, bins: int = BINS) -> Reliability:
    """float [n], bool [n], n > 0. Equal probabilities share their outcomes, so that their order does not matter."""
    values, group = probabilities.double().unique(return_inverse=True)
    true = torch.bincount(group, outcomes.double(), len(values)) / torch.bincount(group, minlength=len(values))
    order = group.sort().values
    n = len(order)
    edges = torch.arange(min(bins, n) + 1) * n // min(bins, n)
    counts = edges.diff()
    sums = torch.stack([values[order], true[order]]).cumsum(1)
    means = torch.cat([sums.new_zeros(2, 1), sums], 1)[:, edges].diff(dim=1) / counts
    return Reliability(means[0], means[1], counts)


def calibration_error(probabilities: Tensor, outcomes: Tensor, bins: int = BINS) -> float:
    """Expected calibration error over bins of equal mass. float [n], bool [n]"""
    return reliability(probabilities, outcomes, bins).error


def error_of_chance(probabilities: Tensor, bins: int = BINS) -> float:
    """The calibration error that true probabilities would show over as many outcomes: the mean of DRAWS draws.
    float [n]"""
    generator = torch.Generator().manual_seed(0)
    p = probabilities.double()
    drawn = torch.rand(DRAWS, len(p), generator=generator, dtype=torch.float64) < p
    return sum(calibration_error(p, outcomes, bins) for outcomes in drawn) / DRAWS


def brier(probabilities: Tensor, outcomes: Tensor) -> float:
    """Mean squared error (Brier 1950). float [n], bool [n]"""
    return float((probabilities.double() - outcomes.double()).square().mean())


def log_loss(probabilities: Tensor, outcomes: Tensor) -> float:
    """Mean negative log-likelihood in nats, of probabilities that are kept off 0 and 1. float [n], bool [n]"""
    p = probabilities.double().clamp(1e-12, 1 - 1e-12)
    return float(-torch.where(outcomes.bool(), p, 1 - p).log().mean())


def area_under_curve(scores: Tensor, outcomes: Tensor) -> float:
    """P(a true outcome's score is above a false one's), ties counting half: the area under the ROC curve, as the
    Mann-Whitney statistic. NaN where all outcomes are the same. float [n], bool [n]"""
    true = outcomes.bool()
    positives, negatives = int(true.sum()), int((~true).sum())
    if not positives * negatives:
        return math.nan
    from scipy.stats import rankdata  # half a second of imports that only fitting needs

    ranks = torch.from_numpy(rankdata(scores.double().numpy()))
    return (float(ranks[true].sum()) - positives * (positives + 1) / 2) / (positives * negatives)


@dataclass(frozen=True, slots=True)
class Quality:
    """How good some probabilities are."""

    rounds: int
    predicted: float  # mean probability
    observed: float  # share that came true
    ece: float
    ece_of_chance: float  # what true probabilities would show over as many rounds
    brier: float
    auc: float | None  # None where all outcomes are the same
    log_loss: float


def quality(probabilities: Tensor, outcomes: Tensor, bins: int = BINS) -> Quality:
    """float [n], bool [n], n > 0"""
    area = area_under_curve(probabilities, outcomes)
    return Quality(
        rounds=len(outcomes),
        predicted=float(probabilities.double().mean()),
        observed=float(outcomes.double().mean()),
        ece=calibration_error(probabilities, outcomes, bins),
        ece_of_chance=error_of_chance(probabilities, bins),
        brier=brier(probabilities, outcomes),
        auc=None if math.isnan(area) else area,
        log_loss=log_loss(probabilities, outcomes),
    )


def survival_quality(confidence: Tensor, verified: Tensor, accepted: Tensor, bins: int = BINS) -> list[Quality]:
    """For each position the survival, against "all drafts up to it were accepted".

    float [n, K], int64 [n], int64 [n] -> one for each position that any round verified.
    """
    survival = confidence.double().cumprod(1)
    found = []
    for j in range(int(verified.max())):
        rows = verified > j
        found.append(quality(survival[rows, j], accepted[rows] > j, bins))
    return found


def conditional_quality(confidence: Tensor, verified: Tensor, accepted: Tensor, bins: int = BINS) -> list[Quality]:
    """For each position the confidence itself, over the rounds in which the drafts before it were accepted.

    float [n, K], int64 [n], int64 [n] -> one for each position that any round came to.
    """
    found = []
    for j in range(int(verified.max())):
        rows = (verified > j) & (accepted >= j)
        if not bool(rows.any()):
            break
        found.append(quality(confidence[rows, j], accepted[rows] > j, bins))
    return found


def pooled(confidence: Tensor, verified: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
    """Survivals of all positions that were verified, and whether all drafts up to them were accepted.

    float [n, K], int64 [n], int64 [n] -> float64 [m], bool [m]
    """
    position = torch.arange(confidence.shape[1])
    seen = verified[:, None] > position
    return confidence.double().cumprod(1)[seen], (accepted[:, None] > position)[seen]


# ------------------------------------------------------------------------------------------------ scaling


@dataclass(frozen=True, slots=True)
class Scaling:
    """Position j's logit z becomes z / temperatures[j] + shifts[j]; positions past the last are treated like it."""

    temperatures: tuple[float, ...]
    shifts: tuple[float, ...]

    @property
    def core_form(self) -> CoreScaling:
        """What the compiled core reads."""
        return self.temperatures, self.shifts, LARGEST_LOGIT

    def apply(self, logits: Tensor) -> Tensor:
        """float [n, K] -> probabilities, float64 [n, K]"""
        last = len(self.temperatures) - 1
        places = torch.arange(logits.shape[1]).clamp(max=last)
        temperatures, shifts = (torch.tensor(v, dtype=torch.float64) for v in (self.temperatures, self.shifts))
        return torch.sigmoid(logits.double() / temperatures[places] + shifts[places])

    def adjust(self, confidence: Sequence[float]) -> list[float]:
        """One row's probabilities, corrected. Element by element: a row's bits do not depend on its neighbours."""
        last = len(self.temperatures) - 1
        return [
            sigmoid(logit(c) / self.temperatures[min(j, last)] + self.shifts[min(j, last)])
            for j, c in enumerate(confidence)
        ]


def fit(
    logits: Tensor,
    verified: Tensor,
    accepted: Tensor,
    *,
    shift: bool | None = False,
    bins: int = BINS,
) -> Scaling:
    """Sequential temperature scaling; with ``shift`` each position gets a shift too (see the module's docstring), with
    None only one that a temperature alone leaves with more error than ENOUGH and than twice that of chance.

    float [n, K], int64 [n], int64 [n]. A position that fewer rounds than bins verified takes over the scaling of the
    one before it.
    """
    before = torch.ones(len(logits), dtype=torch.float64)
    temperatures, shifts = [], []
    temperature, offset = 1.0, 0.0
    for j in range(logits.shape[1]):
        rows = verified > j
        if int(rows.sum()) >= bins:
            z, survived, outcomes = logits[rows, j].double(), before[rows], accepted[rows] > j
            error, temperature, offset = _best(z, survived, outcomes, bins, shift=bool(shift))
            if shift is None and error > ENOUGH:
                chance = error_of_chance(survived * torch.sigmoid(z / temperature), bins)
                if error > 2 * chance:
                    _, temperature, offset = _best(z, survived, outcomes, bins, shift=True)
        temperatures.append(temperature)
        shifts.append(offset)
        before = before * torch.sigmoid(logits[:, j].double() / temperature + offset)
    return Scaling(tuple(temperatures), tuple(shifts))


def _best(z: Tensor, survived: Tensor, outcomes: Tensor, bins: int, *, shift: bool) -> tuple[float, float, float]:
    """The least error on GRID, and the temperature and shift that have it; of equals those nearest to 1 and 0."""
    tried = []
    for t in GRID:
        b = _shift(z / t, survived, outcomes) if shift else 0.0
        error = calibration_error(survived * torch.sigmoid(z / t + b), outcomes, bins)
        tried.append((error, abs(math.log(t)), t, b))
    error, _, temperature, offset = min(tried)
    return error, temperature, offset


def _shift(z: Tensor, survived: Tensor, outcomes: Tensor) -> float:
    """b with mean(survived * sigmoid(z + b)) = mean(outcomes), as near as a finite b comes."""
    wanted = float(outcomes.double().mean())

    def excess(b: float) -> float:
        return float((survived * torch.sigmoid(z + b)).mean()) - wanted

    from scipy.optimize import brentq

    most = 2 * LARGEST_LOGIT
    if excess(-most) >= 0:
        return -most
    return most if excess(most) <= 0 else float(brentq(excess, -most, most, xtol=1e-6))


def logits_of(probabilities: Tensor) -> Tensor:
    """The logits of probabilities that a float32 sigmoid may have rounded to 0 or 1. float -> float64"""
    return torch.logit(probabilities.double()).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)


def logit(p: float) -> float:
    """One probability's, as ``logits_of`` has it."""
    if p <= 0 or p >= 1:  # and NaN stays NaN
        return -LARGEST_LOGIT if p <= 0 else LARGEST_LOGIT
    return min(max(math.log(p / (1 - p)), -LARGEST_LOGIT), LARGEST_LOGIT)


def sigmoid(z: float) -> float:
    """One logit's probability."""
    small = math.exp(-abs(z))  # never overflows
    return (1 if z >= 0 else small) / (1 + small)


# ------------------------------------------------------------------------------------------------ a drafter's file


@dataclass(frozen=True, slots=True)
class Calibration:
    """One drafter's calibration: a scaling for each verification rule and temperature it was fitted for."""

    scalings: Mapping[tuple[str, float], Scaling]  # (rule, temperature)
    facts: Mapping[str, Any] = field(default_factory=dict)  # how it was made; nothing is computed from it
    _latest: dict[tuple[str, float], Scaling] = field(default_factory=dict, init=False, repr=False, compare=False)

    def scaling(self, rule: str, temperature: float) -> Scaling | None:
        """That of the rule and the nearest temperature; None where nothing was fitted for the rule."""
        near = [(abs(t - temperature), t) for r, t in self.scalings if r == rule]
        return self.scalings[rule, min(near)[1]] if near else None

    def _scaling_of(self, params: SamplingParams) -> Scaling | None:
        """``scaling``, remembered for a few kinds of requests."""
        bucket = params.effective_rule, params.temperature
        found = self._latest.get(bucket)
        if found is None:
            found = self.scaling(*bucket)
            if found is not None:
                if len(self._latest) >= REMEMBERED:
                    self._latest.clear()
                self._latest[bucket] = found
        return found

    def core_scalings(self, params: Sequence[SamplingParams]) -> list[CoreScaling | None]:
        """Each request's scaling as the compiled core reads it."""
        return [None if s is None else s.core_form for s in map(self._scaling_of, params)]

    def calibrated(self, proposal: Proposal, context: Context) -> Proposal:
        """The same drafts, each row's confidence corrected for its request's rule and temperature.

        Confidence j is made of confidence j alone, so what did not anticipate still does not.
        """
        confidence = proposal.confidence
        if confidence is None:
            return proposal
        adjusted = _adjusted(confidence, [self._scaling_of(params) for params in context.params[: len(confidence)]])
        return Proposal(proposal.arrays[0], proposal.counts, proposal.distribution, adjusted, proposal.parents)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as ``from_json`` reads it."""
        buckets = [
            {
                "rule": rule,
                "temperature": temperature,
                "temperatures": list(scaling.temperatures),
                "shifts": list(scaling.shifts),
            }
            for (rule, temperature), scaling in sorted(self.scalings.items())
        ]
        return {"format": FORMAT, "version": VERSION, "buckets": buckets, "facts": dict(self.facts)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = FILE) -> Calibration:
        """Raises CheckpointError, naming ``where``, for anything else."""
        if value.get("format") != FORMAT or value.get("version") != VERSION:
            raise CheckpointError(
                f"{where}: expected format {FORMAT!r}, version {VERSION}, got {value.get('format')!r}, "
                f"{value.get('version')!r}; `outrider calibrate` makes such a file"
            )
        buckets, facts = value.get("buckets"), value.get("facts", {})
        if not isinstance(buckets, list) or not isinstance(facts, dict):
            raise CheckpointError(f"{where}: expected a list `buckets` and an object `facts`")
        scalings = {}
        for number, bucket in enumerate(buckets):
            try:
                temperatures = tuple(float(t) for t in bucket["temperatures"])
                shifts = tuple(float(b) for b in bucket["shifts"])
                key = str(bucket["rule"]), float(bucket["temperature"])
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{where}: bucket {number}: expected rule, temperature, and numbers in temperatures and shifts "
                    f"({type(error).__name__}: {error})"
                ) from error
            sound = all(math.isfinite(v) for v in (*temperatures, *shifts, key[1])) and all(t > 0 for t in temperatures)
            if not temperatures or len(temperatures) != len(shifts) or not sound:
                raise CheckpointError(
                    f"{where}: bucket {number}: expected as many finite shifts as temperatures above 0, "
                    f"got {list(temperatures)} and {list(shifts)}"
                )
            scalings[key] = Scaling(temperatures, shifts)
        return cls(scalings, facts)


def _adjusted(confidence: Tensor, scalings: Sequence[Scaling | None]) -> Tensor:
    """``Scaling.adjust`` of each row, by the compiled core where it can. float32 [B, K], B of them -> float32 [B, K]"""
    if native is None or confidence.dtype != torch.float32 or confidence.device.type != "cpu":
        pairs = zip(confidence.tolist(), scalings, strict=True)
        rows = [row if scaling is None else scaling.adjust(row) for row, scaling in pairs]
        return torch.tensor(rows).view(confidence.shape)
    given = confidence.contiguous().numpy()
    out = np.empty(given.shape, np.float32)
    native.scale_confidence(given, [None if s is None else s.core_form for s in scalings], out)
    return torch.from_numpy(out)
