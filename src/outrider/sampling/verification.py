"""Verification: which drafted tokens are accepted, and the bonus (or recovered) token after them. Pure functions.

Three rules; each gives exactly the target's distribution, whatever was drafted:

``rejection``  Leviathan, Kalman, Matias (arXiv 2211.17192, algorithm 1); Chen et al. (arXiv 2302.01318, algorithm 2).
               Draft x_j is accepted with probability min(1, p(x_j) / q(x_j)); at the first rejection the recovered
               token comes from norm(max(p - q, 0)).
``block``      Sun et al. (arXiv 2403.10444, algorithm 2): how much is accepted is decided for the block as a whole,
               which accepts at least as many tokens. See ``acceptance_probabilities``.
``coupled``    Daliri, Musco, Suresh (arXiv 2408.07978, section 3). The target draws its token at every position with
               the Gumbel values that the drafter had; drafts are accepted while they equal it. The text depends neither
               on the drafts nor on how many of them are verified.

Greedy rows (temperature 0) accept the drafts that are the target's argmax, which is what all three rules come to.
Where a schedule verifies ``keep[b]`` of a row's drafts, the round is that of a draft of keep[b] tokens.

The steps are functions of their own, so that a test can enumerate the distribution of what comes out::

    acceptance_probabilities  distributions, drafts    -> AcceptanceProbabilities, of each draft
    count_accepted            probabilities, uniforms  -> accepted [B]
    bonus_distribution        probabilities, accepted  -> Categorical [B], of the bonus token
    match                     the target's draws       -> accepted [B], bonus [B]; ``coupled`` and greedy rows
    verify                    all of them with an rng  -> Verification

Streams used here: uniforms "accept" (each draft, at its position) and "own" (at the position of the bonus token) under
``rejection`` and ``block``; token keys "own" under ``coupled``. Sampling drafters use token keys "draft". The names are
part of the streams: another name would give another text for a seed.

Legend: B rows, K drafts at most, V vocabulary, R target distributions: row b owns keep[b] + 1 of them in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outrider.errors import DraftsFailed, RowsFailed
from outrider.sampling.distribution import Categorical, Processed, failed_rows, settled
from outrider.types import Context, Distribution, Proposal, Rng, Verification

__all__ = [
    "AcceptanceProbabilities",
    "DraftRound",
    "acceptance_probabilities",
    "bonus_distribution",
    "count_accepted",
    "match",
    "verify",
]

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]

_WIDE = 1 << 15  # a vocabulary above which drawing a row takes longer than another call
_TINY = 1e-300  # stands for a q that rounded to 0: with it any p > 0 is accepted, and p = 0 is not


@dataclass(frozen=True, slots=True)
class DraftRound:
    """What was drafted, what of it is verified, and the distributions of target and drafter."""

    target: Categorical  # R rows
    distribution: Distribution | None  # the drafter's; None: deterministic drafts
    tokens: _Ints  # [B, K]
    keep: _Ints  # [B]
    starts: _Ints  # [B]   first of each row in ``target``
    drafted: _Ints  # [B]  first of each row in ``distribution``

    @staticmethod
    def of(target: Processed, proposal: Proposal, keep: Sequence[int]) -> DraftRound:
        target = settled(target)
        tokens, counts = proposal.arrays[0], np.array(keep, np.int64)
        assert len(target) == counts.sum() + len(counts), (
            "one distribution for each kept draft and one more for each row"
        )
        starts = np.cumsum(counts + 1) - (counts + 1)
        drafter = proposal.distribution
        drafter = settled(drafter) if isinstance(drafter, Processed) else drafter
        return DraftRound(target, drafter, tokens, counts, starts, np.arange(len(counts)) * tokens.shape[1])

    def only(self, rows: _Ints) -> DraftRound:
        """Some of the rows."""
        if len(rows) == len(self.keep):
            return self
        keep = self.keep[rows]
        row, depth = _unfold(keep + 1)
        target = self.target.take(torch.from_numpy(self.starts[rows][row] + depth))
        starts = np.cumsum(keep + 1) - (keep + 1)
        return DraftRound(target, self.distribution, self.tokens[rows], keep, starts, self.drafted[rows])


@dataclass(frozen=True, slots=True)
class AcceptanceProbabilities:
    """What ``count_accepted`` compares with uniform numbers, and what ``bonus_distribution`` needs."""

    probability: _Floats  # [B, K]     0 past keep
    scale: _Floats  # [B, K + 1]       weight of the target's distribution in the residual after so many accepted drafts
    block: npt.NDArray[np.bool_]  # [B]  rows under ``block``; the others are under ``rejection``


# ------------------------------------------------------------------------------------------------ the round


def verify(target: Processed, proposal: Proposal, keep: Sequence[int], context: Context, rng: Rng) -> Verification:
    """Verify the first ``keep[b]`` drafts of each row; rows may differ in rule and temperature.

    target: the distributions after ``process``, sum(keep + 1) of them: row b's first follows ``context.history[b]``,
    its next ones each verified draft. keep [B], at most ``proposal.lengths``. The rule is each request's
    ``effective_rule``. ``proposal.distribution`` may leave out rows at the end that keep nothing. Results are on the
    CPU. Raises RowsFailed for rows of ``target`` that cannot be sampled from, where a text gets there; DraftsFailed for
    such rows of the drafter.
    """
    target = settled(target)
    if target.is_greedy:
        if not proposal.width:  # plain decoding
            draws = target.certain
            if min(draws) < 0:
                raise RowsFailed([r for r, token in enumerate(draws) if token < 0])
            return Verification.of_lists([0] * len(draws), [[token] for token in draws])
        return _verify_greedy(target.certain, proposal.arrays[0].tolist(), keep)
    failed = failed_rows(target.logits)
    if failed:
        return _verify_up_to(failed, target, proposal, keep, context, rng)
    whole = DraftRound.of(target, proposal, keep)
    # Greedy rows: all rules come to the same, and "coupled" takes least time.
    rules = [p.effective_rule if p.temperature else "coupled" for p in context.params]
    positions = np.array([len(tokens) for tokens in context.history], np.int64)
    accepted, bonus = np.zeros((2, len(rules)), np.int64)
    coupled = np.array([rule == "coupled" for rule in rules])
    if coupled.any():
        rows = np.flatnonzero(coupled)
        part = whole.only(rows)
        row, depth = _unfold(part.keep + 1)
        keys = rng.token_keys(torch.from_numpy(rows[row]), torch.from_numpy(positions[rows][row] + depth), "own")
        accepted[rows], bonus[rows] = _match_draws(part, keys)
    if not coupled.all():
        rows = np.flatnonzero(~coupled)
        part = whole.only(rows)
        distribution = part.target
        if part.keep.any():
            probabilities = acceptance_probabilities(part, np.array([rules[b] == "block" for b in rows]))
            uniforms = np.ones(part.tokens.shape)
            row, depth = _unfold(part.keep)
            owner, position = torch.from_numpy(rows[row]), torch.from_numpy(positions[rows][row] + depth)
            uniforms[row, depth] = _array(rng.uniform(owner, position, "accept"))
            accepted[rows] = count_accepted(probabilities, uniforms)
            distribution = bonus_distribution(part, probabilities, accepted[rows])
        after = torch.from_numpy(positions[rows] + accepted[rows])
        bonus[rows] = _array(distribution.pick(rng.uniform(torch.from_numpy(rows), after, "own")))
    return _verification(whole.tokens, accepted, bonus)


def _verify_greedy(draws: list[int], drafts: list[list[int]], keep: Sequence[int]) -> Verification:
    """Accept drafts that are the target's argmax. draws [R], drafts [B, K]; plain lists are fastest for so few.

    A draw of -1 (no number) ends its request where the text gets to it, and not before: a draft that leads to it is
    given as the bonus token of the row before, so that the next round begins there."""
    accepted, tokens, start = [], [], 0
    failed = []
    for row, count in zip(drafts, keep, strict=True):
        same = 0
        while same < count and row[same] == draws[start + same]:
            same += 1
        if draws[start + same] < 0:
            if not same:
                failed.append(start)
            same = max(same - 1, 0)
        accepted.append(same)
        tokens.append([*row[:same], draws[start + same], *row[same:]])
        start += count + 1
    if failed:
        raise RowsFailed(failed)
    return Verification.of_lists(accepted, tokens)


def _verify_up_to(
    failed: list[int], target: Categorical, proposal: Proposal, keep: Sequence[int], context: Context, rng: Rng
) -> Verification:
    """``verify`` where the ``failed`` rows of ``target`` cannot be sampled from: no draft after such a row is verified,
    and one that leads to it is given as ``_verify_greedy`` does. Lossless under every rule, since whether draft j + 1
    is verified may depend on the drafts up to j."""
    starts = np.cumsum([0, *(count + 1 for count in keep)])[:-1].tolist()
    shorter = [
        min([count, *(row - start for row in failed if start <= row)])
        for start, count in zip(starts, keep, strict=True)
    ]
    rows = [start + depth for start, count in zip(starts, shorter, strict=True) for depth in range(count + 1)]
    logits = target.logits.clone()
    logits[failed] = 0.0  # what is drawn from these is not used
    some = Categorical(target.vocab_size, logits=logits, ids=target.ids).take(torch.tensor(rows))
    accepted, tokens = verify(some, proposal, shorter, context, rng).lists
    reached = [b for b, (start, n) in enumerate(zip(starts, accepted, strict=True)) if start + n in failed]
    if any(not accepted[b] for b in reached):
        raise RowsFailed([starts[b] for b in reached if not accepted[b]])
    return Verification.of_lists([n - (b in reached) for b, n in enumerate(accepted)], tokens)


# ------------------------------------------------------------------------------------------------ coupled and greedy


def match(round: DraftRound, draws: _Ints) -> tuple[_Ints, _Ints]:
    """Accept drafts that equal the target's draw, up to the first that does not. draws [R] -> accepted, bonus [B]."""
    depth = np.arange(round.tokens.shape[1])
    index = np.minimum(round.starts[:, None] + depth, len(draws) - 1)
    same = (round.tokens == draws[index]) & (depth < round.keep[:, None])
    accepted = np.logical_and.accumulate(same, 1).sum(1)
    return accepted, draws[round.starts + accepted]


def _match_draws(round: DraftRound, keys: Tensor) -> tuple[_Ints, _Ints]:
    """Draw from the target and ``match``. keys int64 [R] -> accepted, bonus [B]. Where a draw takes long (``_WIDE``),
    only those up to the first draft that differs are made."""
    target = round.target
    row, depth = _unfold(round.keep + 1)
    draws = np.full(len(target), -1)
    wide = target.ids is None and target.vocab_size > _WIDE
    wanted = depth == 0 if wide else np.ones(len(target), bool)
    while True:
        index = torch.from_numpy(np.flatnonzero(wanted))
        distribution, some = (target, keys) if len(index) == len(target) else (target.take(index), keys[index])
        draws[wanted] = _array(distribution.draw(some))
        accepted, bonus = match(round, draws)
        wanted = (depth == accepted[row]) & (draws < 0)  # the position after the accepted drafts, where not yet drawn
        if not wanted.any():
            return accepted, bonus


# ------------------------------------------------------------------------------------------------ rejection and block


def acceptance_probabilities(round: DraftRound, block: npt.NDArray[np.bool_]) -> AcceptanceProbabilities:
    """The acceptance probability of each draft. block [B]: rows under ``block``, the others under ``rejection``.

    ``rejection``: min(1, p(x_j) / q(x_j)), and the residual is norm(max(p - q, 0)).

    ``block``, equations 3 and 4 of the paper, with gamma = keep[b] and i drafts accepted: p_0 = 1,
    p_i = min(p_{i-1} p(x_i) / q(x_i), 1), the residual is norm(max(p_i p - q, 0)) of the distributions that follow
    draft i, its mass before norming is S_i, and h_i = S_i / (S_i + 1 - p_i), h_gamma = p_gamma. i drafts are accepted
    where uniform i < h_i; the largest such i counts.
    """
    row, depth = _unfold(round.keep)
    tokens = round.tokens[row, depth]
    p, q = np.zeros((2, *round.tokens.shape))
    q[:] = 1.0
    if len(row):
        p[row, depth] = _probability(round.target, round.starts[row] + depth, tokens)
        if round.distribution is not None:
            q[row, depth] = _probability(round.distribution, round.drafted[row] + depth, tokens)
            failed = np.isnan(q)
            if failed.any():
                rows = np.flatnonzero(failed.any(1))
                owners = round.drafted[rows] // round.tokens.shape[1]
                raise DraftsFailed(dict(zip(owners.tolist(), failed[rows].argmax(1).tolist(), strict=True)))
    ratio = p / np.maximum(q, _TINY)
    probability = np.minimum(ratio, 1)
    scale = np.ones((len(ratio), ratio.shape[1] + 1))
    if not block.any():
        return AcceptanceProbabilities(probability, scale, block)

    for i in range(ratio.shape[1]):
        scale[block, i + 1] = np.minimum(scale[block, i] * ratio[block, i], 1)
    probability[block] = scale[block, 1:]  # right for the last kept draft, and 0 past it, where p is
    inner = block[row] & (depth > 0)  # drafts that follow another: there S_i of the i before it is wanted
    row, depth = row[inner], depth[inner]
    if len(row):
        weight = scale[row, depth]
        if round.distribution is None:
            mass = weight * (1 - p[row, depth])  # q is all on the draft, where weight * p <= 1
        else:
            mass = _array(_residual(round, row, depth, weight)[0].sum(1).double())
        short = mass + (1 - weight)
        # Both vanish where weight = 1 and p = q: the next draft is then accepted for certain, and with it this one.
        probability[row, depth - 1] = np.divide(mass, short, out=np.zeros_like(mass), where=short > 0)
    return AcceptanceProbabilities(probability, scale, block)


def count_accepted(probabilities: AcceptanceProbabilities, uniforms: _Floats) -> _Ints:
    """How many drafts each row keeps. uniforms in (0, 1), [B, K] -> [B]."""
    passed = uniforms < probabilities.probability  # strictly: a draft of probability 0 is never accepted
    first = np.logical_and.accumulate(passed, 1).sum(1)  # rejection: up to the first that fails
    last = np.where(passed, np.arange(1, passed.shape[1] + 1), 0).max(1, initial=0)  # block: up to the last that passes
    return np.where(probabilities.block, last, first)


def bonus_distribution(round: DraftRound, probabilities: AcceptanceProbabilities, accepted: _Ints) -> Categorical:
    """The distribution of each row's bonus token after ``accepted[b]`` drafts: the target's where all were accepted,
    else the residual. -> B rows

    Where rounding leaves a residual without mass, p and q agree to the last bits and the draft was rejected by those
    bits: the target's distribution is then right to the same precision.
    """
    rejected = accepted < round.keep
    index = torch.from_numpy(round.starts + accepted)
    if not rejected.any():
        return round.target.take(index)
    rows = np.arange(len(accepted))
    residual, ids = _residual(round, rows, accepted, probabilities.scale[rows, accepted])
    mass = residual.sum(1, keepdim=True)
    use = torch.from_numpy(rejected)[:, None].to(mass.device) & (mass > 0)
    if use.all():
        return Categorical(round.target.vocab_size, probabilities=residual.div_(mass), ids=ids)
    plain = round.target.columns(index)[0]
    return Categorical(round.target.vocab_size, probabilities=torch.where(use, residual / mass, plain), ids=ids)


def _residual(round: DraftRound, row: _Ints, depth: _Ints, weight: _Floats) -> tuple[Tensor, Tensor | None]:
    """max(weight * p - q, 0) after ``depth[i]`` drafts of row ``row[i]``; meaningless where that is all of them.

    -> [n, S] in the columns of the target's distribution, and their tokens, int64 [n, S] (None: column v is token v).
    """
    mass, ids = round.target.columns(torch.from_numpy(round.starts[row] + depth))
    if (weight != 1).any():
        mass = mass.mul_(torch.from_numpy(weight).to(mass)[:, None])
    if round.distribution is None:  # q is all on the draft, and weight * p <= 1 there
        token = round.tokens[row, np.minimum(depth, round.tokens.shape[1] - 1)]
        draft = torch.from_numpy(np.where(depth < round.keep[row], token, 0))[:, None].to(mass.device)
        return mass.scatter_(1, draft, 0) if ids is None else mass.masked_fill_(ids == draft, 0), ids
    index = torch.from_numpy(np.minimum(round.drafted[row] + depth, len(round.distribution) - 1))
    q = round.distribution.dense(index) if ids is None else _lookup(round.distribution, index, ids)
    return (mass - q if q.dtype != mass.dtype else mass.sub_(q)).clamp_min_(0), ids


# ------------------------------------------------------------------------------------------------ helpers


def _lookup(distribution: Distribution, index: Tensor, ids: Tensor) -> Tensor:
    """Probabilities of ``ids`` [n, S'] (V: no token) at ``index`` [n]."""
    if isinstance(distribution, Categorical):
        return distribution.lookup(index, ids)
    rows = distribution.dense(index)
    inside = rows.gather(1, ids.clamp_max(rows.shape[1] - 1))
    return torch.where(ids < rows.shape[1], inside, 0)


def _probability(distribution: Distribution, rows: _Ints, tokens: _Ints) -> _Floats:
    """Probability of ``tokens[i]`` in row ``rows[i]``."""
    index, ids = torch.from_numpy(rows), torch.from_numpy(tokens)
    found = (
        distribution.at(ids, index)
        if isinstance(distribution, Categorical)
        else _lookup(distribution, index, ids[:, None])[:, 0]
    )
    return _array(found.double())


def _unfold(counts: _Ints) -> tuple[_Ints, _Ints]:
    """For every item of rows with so many items each: its row, and its index in the row."""
    row, index = np.nonzero(np.arange(counts.max(initial=0)) < counts[:, None])
    return row, index


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    return tensor.cpu().numpy()


def _verification(drafts: _Ints, accepted: _Ints, bonus: _Ints) -> Verification:
    tokens = np.concatenate([drafts, bonus[:, None]], 1)
    tokens[np.arange(len(bonus)), accepted] = bonus
    return Verification(torch.from_numpy(accepted), torch.from_numpy(tokens), torch.from_numpy(accepted + 1))
