"""A drafter whose acceptance and cost are set, for measuring schedulers: it replays texts that are known beforehand.

Its drafts are the target's own tokens, of which a set share is replaced by a wrong one; proposing takes a set time.
Texts that do not depend on the drafter (greedy, or seeded and coupled) are recorded with plain decoding once, so any
acceptance profile and any cost can be tested on a real target, which no trained drafter allows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Literal

from torch import Tensor

from outrider.errors import InvalidRequest
from outrider.types import Context, Proposal, RaggedBatch, Rng, Values

__all__ = ["SyntheticDrafter"]

Says = Literal["truth", "sure", "nothing"]


class SyntheticDrafter:
    """Replays ``texts``: prompt -> the tokens that follow it. Unknown prompts are drafted for with wrong tokens."""

    aux_layers: tuple[int, ...] = ()

    def __init__(
        self,
        texts: Mapping[tuple[int, ...], Sequence[int]],
        profile: Sequence[float],
        *,
        vocab_size: int,
        profiles: Mapping[tuple[int, ...], Sequence[float]] | None = None,
        seconds: float = 0.0,
        seconds_each: float = 0.0,
        seconds_per_draft: float = 0.0,
        says: Says = "truth",
        spread: float = 0.0,
        seed: int = 0,
    ) -> None:
        """``profile``: probability that draft 1, 2, ... is right, where those before it were; ``profiles``: other ones
        of single prompts. ``seconds``: of a proposal, ``seconds_each``: of each draft of each row,
        ``seconds_per_draft``: of each draft of the longest row. ``says``: confidences are true, 0.99 or not given.
        ``spread``: how far the probabilities of single drafts differ from the profile, up and down. Each place of a
        text is as hard for every drafter of this ``seed``, so that schedulers that are compared meet the same luck.
        """
        self._profiles = dict(profiles or {})
        for one in (profile, *self._profiles.values()):
            if len(one) != len(profile) or not one or any(not 0 <= p <= 1 for p in one):
                raise InvalidRequest(
                    f"profile must hold probabilities between 0 and 1, as many of every prompt, got {list(one)}"
                )
        if says not in ("truth", "sure", "nothing"):
            raise InvalidRequest(f"says must be truth, sure or nothing, got {says!r}")
        self.block = len(profile)
        self._texts, self._profile, self._vocab = dict(texts), list(profile), vocab_size
        self._seconds, self._seconds_each, self._seconds_per_draft = seconds, seconds_each, seconds_per_draft
        self._says, self._spread = says, spread
        self._random = random.Random(seed)
        self._luck = {prompt: [self._draw() for _ in text] for prompt, text in self._texts.items()}

    def _draw(self) -> tuple[float, float]:
        """How far a draft is from the profile, -1 to 1, and the probability from which on it is right."""
        return self._random.uniform(-1, 1), self._random.random()

    def open(self, slot: int, capacity: int) -> None:
        """Nothing to reserve."""

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        """Deterministic drafts. The time set is spent waiting, as a drafter's own work would be."""
        ends = perf_counter() + self._seconds + self._seconds_per_draft * min(max(limit, default=0), self.block)
        drafts: list[list[int]] = []
        confidence: list[list[float]] = []
        for b, most in enumerate(limit):
            if not most:
                drafts.append([])
                confidence.append([])
                continue
            ends += self._seconds_each * min(most, self.block)
            history, length = context.history[b], context.prompt_lengths[b]
            prompt = tuple(history[:length])
            text, profile = self._texts.get(prompt, ()), self._profiles.get(prompt, self._profile)
            at = len(history) - length
            right, luck = text[at : at + self.block], self._luck.get(prompt, [])[at : at + self.block]
            row, sure = [], []
            for j in range(min(most, self.block)):
                off, needed = luck[j] if j < len(luck) else self._draw()
                p = min(max(profile[j] + off * self._spread, 0.0), 1.0)
                known = right[j] if j < len(right) else 0
                row.append(known if needed < p else (known + 1) % self._vocab)
                sure.append(0.99 if self._says == "sure" else p)
            drafts.append(row)
            confidence.append(sure)
        while perf_counter() < ends:
            pass
        proposal = Proposal.pack(drafts, confidence)
        if self._says == "nothing":
            return Proposal(proposal.arrays[0], proposal.counts)
        return proposal

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        """Nothing: the texts are known."""

    def reset_rows(self) -> None:
        """Nothing to free."""

    def close(self, slot: int) -> None:
        """Nothing to free."""
