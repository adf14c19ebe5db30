"""What the drafts of a simulated engine are like: how sure the drafter is of each, and how many are accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from outrider.errors import InvalidRequest

__all__ = ["PROFILES", "Acceptance", "Recorded", "Synthetic"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PROFILES: dict[str, tuple[float, ...]] = {  # P(draft j accepted | those before it were)
    "chat": (0.72, 0.69, 0.67, 0.66, 0.65, 0.64, 0.63),
    "code": (0.88, 0.87, 0.86, 0.85, 0.85, 0.84, 0.84),
    "maths": (0.92, 0.91, 0.91, 0.90, 0.90, 0.89, 0.89),
    "hostile": (0.02,) * 7,
}
"""Shapes like those of the DSpark paper's figure 2."""


class Acceptance(Protocol):
    """What drafts of some rows would be: how sure the drafter is, and how many would be accepted."""

    drafts: int

    def begin(self, slot: int, rng: np.random.Generator) -> None:
        """A request begins in a slot."""
        ...

    def draw(self, slots: Ints, rng: np.random.Generator) -> tuple[npt.NDArray[np.float32] | None, Ints, Ints]:
        """-> confidences [n, K] or None, drafts proposed [n], and how many in a row would be accepted [n]."""
        ...

    def advance(self, slot: int, tokens: int) -> None:
        """The text of a slot has become longer by so many tokens."""
        ...


@dataclass
class Synthetic:
    """Acceptance by profile. Each draft has its own probability, around the profile's on the logit scale."""

    profiles: Sequence[Sequence[float]]
    """P(accepted | those before were) by position; each request has one of them."""
    spread: float = 1.5
    """How far single drafts differ, in logits."""
    row_spread: float = 0.5
    """How far requests differ."""
    says: str = "truth"
    """truth: the confidence is the probability; nothing: none is given; sure: 0.99 whatever the truth."""
    silent: float = 0.0
    """Share of rounds in which nothing is proposed."""
    _rows: dict[int, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.says not in ("truth", "nothing", "sure"):
            raise InvalidRequest(f"says must be truth, nothing or sure, got {self.says!r}")
        if not self.profiles or any(not 0 <= p <= 1 for profile in self.profiles for p in profile):
            raise InvalidRequest("profiles need probabilities between 0 and 1")
        self.drafts = min(len(profile) for profile in self.profiles)
        self._base = [_centred(profile[: self.drafts], self.spread, self.row_spread) for profile in self.profiles]

    def begin(self, slot: int, rng: np.random.Generator) -> None:
        self._rows[slot] = self._base[rng.integers(len(self._base))] + self.row_spread * rng.standard_normal()

    def draw(self, slots: Ints, rng: np.random.Generator) -> tuple[npt.NDArray[np.float32] | None, Ints, Ints]:
        z = np.stack([self._rows[slot] for slot in slots.tolist()])
        p = 1 / (1 + np.exp(-(z + self.spread * rng.standard_normal(z.shape))))
        accepted = np.multiply.accumulate(rng.random(p.shape) < p, axis=1).sum(1)
        lengths = np.where(rng.random(len(slots)) < self.silent, 0, self.drafts)
        said = {"truth": p, "sure": np.full(p.shape, 0.99), "nothing": None}[self.says]
        return None if said is None else said.astype(np.float32), lengths, np.minimum(accepted, lengths)

    def advance(self, slot: int, tokens: int) -> None:
        """Nothing: all places of a text are alike."""


def _centred(profile: Sequence[float], spread: float, row_spread: float) -> Floats:
    """Logits around which drafts spread so that their mean probability is about the profile's (a probit's moments)."""
    p = np.clip(np.array(profile, dtype=float), 1e-4, 1 - 1e-4)
    return np.log(p / (1 - p)) * math.sqrt(1 + (spread**2 + row_spread**2) * math.pi / 8)


@dataclass
class Recorded:
    """Rounds of real requests. A request replays the text of a recorded one, and goes on with another where that ends.

    A recorded round stands for as many tokens as it committed. Where fewer drafts are verified, the next round begins
    inside of it, as it would in the same text: whichever draft length is replayed, easy and hard places count by their
    tokens. What would follow the last recorded draft of such a round is drawn from the means over all rounds.
    """

    requests: Sequence[Sequence[tuple[Sequence[float], int]]]
    """For each request its rounds: the confidences of all drafts, and how many were accepted, all being verified."""
    _at: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # by slot: request, round, tokens since it began

    def __post_init__(self) -> None:
        rounds = [one for some in self.requests for one in some]
        if not rounds or not all(self.requests):
            raise InvalidRequest("a recording needs requests with at least one round each")
        self.drafts = max(len(confidence) for confidence, _ in rounds)
        reached, further = np.zeros(self.drafts), np.zeros(self.drafts)
        sure, counts = np.zeros(self.drafts), np.zeros(self.drafts)
        for confidence, accepted in rounds:
            n = len(confidence)
            sure[:n] += confidence
            counts[:n] += 1
            reached[: min(accepted + 1, n)] += 1
            further[:accepted] += 1
        self._sure = sure / np.maximum(counts, 1)
        self._further = (further / np.maximum(reached, 1)).tolist()  # P(draft j accepted | those before it were)

    def begin(self, slot: int, rng: np.random.Generator) -> None:
        self._at[slot] = int(rng.integers(len(self.requests))), 0, 0

    def advance(self, slot: int, tokens: int) -> None:
        request, at, past = self._at[slot]
        self._at[slot] = request, at, past + tokens

    def draw(self, slots: Ints, rng: np.random.Generator) -> tuple[npt.NDArray[np.float32] | None, Ints, Ints]:
        said = np.zeros((len(slots), self.drafts), dtype=np.float32)
        lengths, accepted = np.zeros(len(slots), dtype=np.int64), np.zeros(len(slots), dtype=np.int64)
        for b, slot in enumerate(slots.tolist()):
            confidence, right, past = self._round(slot, rng)
            n = len(confidence)
            known = n - past
            said[b, :known], said[b, known:n] = confidence[past:], self._sure[known:n]
            right -= past
            while known <= right < n and rng.random() < self._further[right]:
                right += 1
            lengths[b], accepted[b] = n, right
        return said, lengths, accepted

    def _round(self, slot: int, rng: np.random.Generator) -> tuple[Sequence[float], int, int]:
        """The recorded round that a slot's text has come to, and how many of its tokens were committed before."""
        request, at, past = self._at[slot]
        rounds = self.requests[request]
        while past > rounds[at][1]:
            past -= rounds[at][1] + 1
            at += 1
            if at == len(rounds):
                request, at = int(rng.integers(len(self.requests))), 0
                rounds = self.requests[request]
        self._at[slot] = request, at, past
        return *rounds[at], past
