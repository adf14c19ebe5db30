"""The exact distribution of what an engine writes: every outcome of its random numbers, each with its probability.

Requests run through the real ``Engine`` on a toy target. A backend (``EnumeratingBackend``) and the random numbers
that the drafter gets (``Noise``) stand in for chance: wherever a number decides something, every outcome is followed
in turn, each by a request that repeats the outcomes so far. **A number is named by its key**, the very bits that the
engine's ``Rng`` derives it from, so two decisions that read the same key read the same number: what the first one
revealed narrows what the second can be. Noise that is used twice is therefore followed exactly, and so are the draws
that drafter and target share under ``coupled``.

A draw of a token is the inversion of one uniform number. With two tokens that is the Gumbel draw itself, jointly over
all draws that share its key (token 0 wins when E_0 / (E_0 + E_1) < p(0), and that ratio is uniform); with more tokens
it has the same marginals.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outrider.config import SamplingParams, StackConfig
from outrider.drafters.draft_model import DraftModelDrafter
from outrider.engine.engine import Engine
from outrider.proof.literal import Texts
from outrider.sampling.distribution import Categorical, Processed, settled
from outrider.sampling.rng import RowRng
from outrider.sampling.verification import (
    AcceptanceProbabilities,
    DraftRound,
    acceptance_probabilities,
    bonus_distribution,
    count_accepted,
    verify,
)
from outrider.types import Context, Distribution, Proposal, Rng, Stack, Verification

__all__ = ["EnumeratingBackend", "EnumeratingDraftModel", "Outcomes", "dense_rows", "enumerate_texts"]

SLIVER = 1e-15
"""Pieces of the unit interval below this are rounding."""
WAVE = 256
"""Requests that are submitted at a time."""


@dataclass(slots=True)
class Outcomes:
    """One sequence of outcomes: repeated as far as it is given, then extended by the first possible one each time."""

    given: tuple[int, ...] = ()
    taken: list[int] = field(default_factory=list)
    weight: float = 1.0
    others: list[tuple[int, ...]] = field(default_factory=list)  # sequences that branch off after what was given
    known: dict[int, tuple[float, float]] = field(default_factory=dict)  # key -> where its number lies

    def choose(self, key: int, probabilities: Sequence[float]) -> tuple[int, float]:
        """Which outcome the number of ``key`` gives, by inversion; and a number that gives it."""
        low, high = self.known.get(key, (0.0, 1.0))
        pieces, below = [], 0.0
        for i, p in enumerate(probabilities):
            above = below + p
            a, b = max(below, low), min(above if i + 1 < len(probabilities) else 1.0, high)
            if b - a > SLIVER:
                pieces.append((i, a, b))
            below = above
        depth = len(self.taken)
        if len(pieces) == 1:
            pick = 0
        elif depth < len(self.given):
            pick = self.given[depth]
            self.taken.append(pick)
        else:
            self.others += [(*self.taken, i) for i in range(1, len(pieces))]
            pick = 0
            self.taken.append(pick)
        outcome, a, b = pieces[pick]
        self.weight *= (b - a) / (high - low)
        self.known[key] = a, b
        return outcome, (a + b) / 2


class _Chosen:
    """The numbers that ``verify`` is to read. (row, position, purpose) -> number; what was not chosen decides nothing.

    Implements ``types.Rng``.
    """

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, int, str], float] = {}

    def uniform(self, rows: Tensor, positions: Tensor, purpose: str) -> Tensor:
        named = zip(rows.tolist(), positions.tolist(), strict=True)
        return torch.tensor([self.numbers.get((*one, purpose), 0.5) for one in named], dtype=torch.float64)

    def token_keys(self, rows: Tensor, positions: Tensor, purpose: str) -> Tensor:
        raise AssertionError("rules whose draws are chosen token by token do not come here")


class _Noise:
    """An ``Rng`` that tells the backend whose each of its token keys is, so that a draw from a key finds its row."""

    def __init__(self, rng: RowRng, backend: EnumeratingBackend) -> None:
        self._rng, self._backend = rng, backend

    def uniform(self, rows: Tensor, positions: Tensor, purpose: str) -> Tensor:
        return self._rng.uniform(rows, positions, purpose)

    def token_keys(self, rows: Tensor, positions: Tensor, purpose: str) -> Tensor:
        keys = self._rng.token_keys(rows, positions, purpose)
        for row, key in zip(rows.tolist(), keys.tolist(), strict=True):
            self._backend.owners[key] = self._backend.outcomes[self._rng.rows[row][0]]
        return keys


class EnumeratingBackend:
    """A backend whose verification and draws follow given outcomes. Controls replace its parts one at a time."""

    name = "enumerating"
    device = torch.device("cpu")
    sound = True
    """Whether the real ``verify`` carries out what was chosen, as it must; a control's own parts do it otherwise."""

    def __init__(self) -> None:
        self.outcomes: dict[int, Outcomes] = {}  # word of a request's seed -> its outcomes
        self.owners: dict[int, Outcomes] = {}  # token key -> the same
        self.verified = 0  # drafts so far
        self.deepest = 0  # most drafts of a row in a round

    # ---------------------------------------------------------------- what a control replaces

    def target(self, target: Categorical, proposal: Proposal, keep: Sequence[int], context: Context) -> Categorical:
        """The distributions that are verified."""
        return target

    def rng(self, rng: Rng) -> Rng:
        """The random numbers of a verification."""
        return rng

    def acceptance(self, round: DraftRound, block: npt.NDArray[np.bool_]) -> AcceptanceProbabilities:
        return acceptance_probabilities(round, block)

    def bonus(
        self,
        round: DraftRound,
        probabilities: AcceptanceProbabilities,
        accepted: npt.NDArray[np.int64],
        context: Context,
    ) -> Distribution:
        """The distribution of each row's bonus (or recovered) token."""
        right = bonus_distribution(round, probabilities, accepted)
        if self.sound:
            return right
        rows = self.bonus_rows(dense_rows(right), round, accepted, context)
        return Categorical(rows.shape[1], probabilities=rows)

    def bonus_rows(self, rows: Tensor, round: DraftRound, accepted: npt.NDArray[np.int64], context: Context) -> Tensor:
        """What bonus tokens are drawn from where the backend is not sound: of the right rows [B, V], which are its own
        to change."""
        return rows

    # ---------------------------------------------------------------- a backend

    def load(self, config: StackConfig, weights: Mapping[str, Tensor], dtype: torch.dtype | str) -> Stack:
        raise AssertionError("an enumerating backend has no layers")

    def sample(self, distribution: Distribution, keys: Tensor) -> Tensor:
        """One token a row from its key."""
        rows = dense_rows(distribution).tolist()
        chosen = [self.owners[key].choose(key, row)[0] for key, row in zip(keys.tolist(), rows, strict=True)]
        return torch.tensor(chosen, dtype=torch.int64)

    def verify(
        self, target: Distribution, proposal: Proposal, keep: Sequence[int], context: Context, rng: Rng
    ) -> Verification:
        """See ``sampling.verification.verify``."""
        assert isinstance(rng, RowRng) and isinstance(target, Processed)
        rows = [self.outcomes[word] for word, _ in rng.rows]
        self.verified += sum(keep)
        self.deepest = max(self.deepest, *keep)
        settled_target = self.target(settled(target), proposal, keep, context)
        round = DraftRound.of(settled_target, proposal, keep)
        shared = [p.effective_rule == "coupled" or p.temperature == 0 for p in context.params]
        if all(shared):
            return self._follow(round, rows, context, self.rng(rng))
        assert not any(shared), "an enumeration takes rows of one rule"
        block = np.array([p.effective_rule == "block" for p in context.params])
        return self._reject(settled_target, round, block, rows, proposal, keep, context, self.rng(rng))

    def _follow(self, round: DraftRound, rows: list[Outcomes], context: Context, rng: Rng) -> Verification:
        """Coupled and greedy rows: the target's draws, up to the first that is not the draft."""
        probabilities = dense_rows(round.target).tolist()
        accepted, bonus = [], []
        for b, outcomes in enumerate(rows):
            count, start, kept = len(context.history[b]), int(round.starts[b]), int(round.keep[b])
            row = torch.full((kept + 1,), b)
            keys = rng.token_keys(row, torch.arange(count, count + kept + 1), "own").tolist()
            for depth in range(kept + 1):
                token, _ = outcomes.choose(keys[depth], probabilities[start + depth])
                if depth == kept or token != round.tokens[b, depth]:
                    break
            accepted.append(depth)
            bonus.append(token)
        return Verification.of(torch.tensor(accepted), torch.from_numpy(round.tokens), torch.tensor(bonus))

    def _reject(
        self,
        target: Categorical,
        round: DraftRound,
        block: npt.NDArray[np.bool_],
        rows: list[Outcomes],
        proposal: Proposal,
        keep: Sequence[int],
        context: Context,
        rng: Rng,
    ) -> Verification:
        """Rows under ``rejection`` or ``block``."""
        probabilities = self.acceptance(round, block)
        uniforms = np.full(round.tokens.shape, 0.5)
        chosen = _Chosen()
        for b, outcomes in enumerate(rows):
            count, kept = len(context.history[b]), int(round.keep[b])
            positions = torch.arange(count, count + kept)
            keys = rng.uniform(torch.full((kept,), b), positions, "accept").tolist()
            # Under block the deepest draft that passes counts, under rejection the first that fails ends it.
            for depth in reversed(range(kept)) if block[b] else range(kept):
                a = float(probabilities.probability[b, depth])
                failed, number = outcomes.choose(_name(keys[depth]), [a, 1 - a])
                uniforms[b, depth] = chosen.numbers[b, count + depth, "accept"] = number
                if bool(failed) != block[b]:
                    break
        accepted = count_accepted(probabilities, uniforms)
        distribution = self.bonus(round, probabilities, accepted, context)
        following = dense_rows(distribution).tolist()
        after = [len(context.history[b]) + int(n) for b, n in enumerate(accepted)]
        keys = rng.uniform(torch.arange(len(rows)), torch.tensor(after), "own").tolist()
        bonus = []
        for b, outcomes in enumerate(rows):
            token, number = outcomes.choose(_name(keys[b]), following[b])
            chosen.numbers[b, after[b], "own"] = number
            bonus.append(token)
        if self.sound:
            return verify(target, proposal, keep, context, chosen)
        return Verification.of(torch.from_numpy(accepted), torch.from_numpy(round.tokens), torch.tensor(bonus))


def _name(uniform: float) -> int:
    """The key that a uniform number was made of, as far as the number tells: 52 bits."""
    return int(uniform * 2.0**53)


class EnumeratingDraftModel(DraftModelDrafter):
    """The draft-model drafter on a toy model, with draws whose outcomes are followed. Controls replace its parts."""

    # ---------------------------------------------------------------- what a control replaces

    def seen(self, context: Context) -> Context:
        """What drafts are drawn under."""
        return context

    def noise(self, rng: RowRng) -> RowRng:
        """The random numbers of a draft."""
        return rng

    def stated(self, drafted: Proposal, context: Context) -> Distribution | None:
        """The distributions that sampled drafts are said to come from."""
        return drafted.distribution

    # ---------------------------------------------------------------- a drafter

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        backend = self.model.backend
        assert isinstance(backend, EnumeratingBackend) and isinstance(rng, RowRng)
        drafted = super().propose(slots, last, self.seen(context), limit, _Noise(self.noise(rng), backend))
        if drafted.distribution is None:
            return drafted
        return Proposal(drafted.tokens, drafted.lengths, self.stated(drafted, context), drafted.confidence)


def dense_rows(distribution: Distribution) -> Tensor:
    """All rows, float64 [n, V]."""
    return distribution.dense(torch.arange(len(distribution))).double()


def enumerate_texts(
    make_engine: Callable[[], Engine],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    together: bool = False,
) -> list[Texts]:
    """The exact distribution of each prompt's text. The engine's target has an ``EnumeratingBackend``.

    Requests of all outcomes share one engine's batches, so a row's neighbours are other outcomes and other prompts.
    ``together``: a new engine for every outcome of all prompts at once, for a policy whose choice for a row depends on
    its neighbours; what is returned are the marginals.
    """
    texts: list[Texts] = [{} for _ in prompts]
    if together:
        pending: deque[tuple[int, ...]] = deque([()])
        while pending:
            one = Outcomes(pending.popleft())
            outputs = _run(make_engine(), [(prompt, one) for prompt in prompts], params)
            for found, output in zip(texts, outputs, strict=True):
                found[output] = found.get(output, 0.0) + one.weight
            pending += one.others
        return texts
    engine = make_engine()
    waiting: deque[tuple[int, tuple[int, ...]]] = deque((i, ()) for i in range(len(prompts)))
    while waiting:
        wave = [waiting.popleft() for _ in range(min(WAVE, len(waiting)))]
        followed = [(i, Outcomes(given)) for i, given in wave]
        outputs = _run(engine, [(prompts[i], one) for i, one in followed], params)
        for (i, one), output in zip(followed, outputs, strict=True):
            texts[i][output] = texts[i].get(output, 0.0) + one.weight
            waiting += [(i, other) for other in one.others]
    return texts


def _run(
    engine: Engine, rows: Sequence[tuple[Sequence[int], Outcomes]], params: SamplingParams
) -> list[tuple[int, ...]]:
    """Texts of one request for each of the outcomes, all in the same engine."""
    backend = engine.target.backend
    assert isinstance(backend, EnumeratingBackend)
    words = [word for word, _ in RowRng(range(len(rows)), [0] * len(rows), ["block"] * len(rows)).rows]
    backend.outcomes = {word: one for word, (_, one) in zip(words, rows, strict=True)}
    backend.owners = {}
    requests = [engine.submit(prompt, params, seed) for seed, (prompt, _) in enumerate(rows)]
    engine.wait(requests)
    return [tuple(request.output) for request in requests]
