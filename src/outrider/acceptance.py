"""Verification: which drafted tokens stay, and which token of its own the target adds. Pure functions.

Three rules; each gives exactly the target's law, whatever was drafted:

``rejection``  Leviathan, Kalman, Matias (arXiv 2211.17192, algorithm 1); Chen et al. (arXiv 2302.01318, algorithm 2).
               Draft x_j stays with probability min(1, p(x_j) / q(x_j)); at the first that does not, the target's own
               token comes from norm(max(p - q, 0)).
``block``      Sun et al. (arXiv 2403.10444, algorithm 2): how much is kept is decided for the block as a whole, which
               keeps at least as many tokens. See ``judge``.
``coupled``    Daliri, Musco, Suresh (arXiv 2408.07978, section 3). The target draws its own token at every place with
               the Gumbel values the drafter had; drafts stay while they are equal to it. The text does not depend on
               the drafts, nor on how many of them are checked.

Greedy rows (temperature 0) keep the drafts that are the target's argmax, which is what all three rules come to.
Where a schedule checks ``keep[b]`` of a row's drafts, the round is that of a draft of keep[b] tokens.

The steps are functions of their own, so that a test can enumerate the law of what comes out::

    judge    laws and drafts           -> Judgement: for each draft the probability that decides about it
    decide   judgement, uniforms       -> accepted [B]
    own_law  judgement, accepted       -> Categorical: the law of the target's own token, [B]
    match    the target's draws        -> accepted [B], own [B]; ``coupled`` and greedy rows
    verify   all of them with noise    -> Verification

Noise used here: uniforms "accept" (each draft, at its position) and "own" (at the position of the target's own token)
under ``rejection`` and ``block``; token keys "own" under ``coupled``. Sampling drafters use token keys "draft".

Legend: B rows, K drafts at most, V vocabulary, R places (laws of the target): row b owns keep[b] + 1 of them in turn.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outrider.core import native
from outrider.errors import OutriderError
from outrider.noise import RowNoise, purpose_word
from outrider.sampling import Categorical
from outrider.types import Context, Law, Noise, Proposal, Verification

__all__ = ["Judgement", "Round", "decide", "judge", "match", "own_law", "truncate", "verify"]

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]

_WIDE = 1 << 15  # a vocabulary so large that a draw costs more than the call
_TINY = 1e-300  # stands for a q that rounded to 0: with it any p > 0 is accepted, and p = 0 is not


@dataclass(frozen=True, slots=True)
class Round:
    """What was drafted, what of it is checked, and the laws on both sides: control in numpy, laws in torch."""

    target: Categorical  # R places
    law: Law | None  # the drafter's; None: deterministic drafts
    tokens: _Ints  # [B, K]
    keep: _Ints  # [B]
    starts: _Ints  # [B]   first place of each row in ``target``
    drafted: _Ints  # [B]  first place of each row in ``law``

    @staticmethod
    def of(target: Categorical, proposal: Proposal, keep: Tensor) -> Round:
        tokens, counts = _array(proposal.tokens), _array(keep)
        assert len(target) == counts.sum() + len(counts), "one law for each kept draft and one more for each row"
        starts = np.cumsum(counts + 1) - (counts + 1)
        return Round(target, proposal.law, tokens, counts, starts, np.arange(len(counts)) * tokens.shape[1])

    def only(self, rows: _Ints) -> Round:
        """Some of the rows."""
        if len(rows) == len(self.keep):
            return self
        keep = self.keep[rows]
        row, depth = _unfold(keep + 1)
        target = self.target.take(torch.from_numpy(self.starts[rows][row] + depth))
        starts = np.cumsum(keep + 1) - (keep + 1)
        return Round(target, self.law, self.tokens[rows], keep, starts, self.drafted[rows])


@dataclass(frozen=True, slots=True)
class Judgement:
    """What ``decide`` compares with uniform numbers, and what ``own_law`` needs."""

    probability: _Floats  # [B, K]     0 past keep
    scale: _Floats  # [B, K + 1]       weight of the target's law in the residual after so many accepted drafts
    block: npt.NDArray[np.bool_]  # [B]  rows under ``block``; the others are under ``rejection``


# ------------------------------------------------------------------------------------------------ the round


def verify(target: Categorical, proposal: Proposal, keep: Tensor, context: Context, noise: Noise) -> Verification:
    """Check the first ``keep[b]`` drafts of each row; rows may differ in rule and temperature.

    target: the laws after ``process``, sum(keep + 1) places: row b's first follows ``context.history[b]``, its next
    ones each kept draft. keep int64 [B], at most ``proposal.lengths``. The rule is each request's ``effective_rule``.
    ``proposal.law`` needs no places for rows at the end that keep nothing. Results are on the CPU.
    """
    forms = _for_the_core(target, proposal.law)
    if forms and isinstance(noise, RowNoise):
        return _verdict(forms, proposal, keep, context, noise)
    if target.is_greedy:
        return _verify_greedy(target.argmax().tolist(), proposal.tokens.tolist(), keep.tolist())
    whole = Round.of(target, proposal, keep)
    rules = [p.effective_rule if p.temperature else "coupled" for p in context.params]  # cheapest for a sure token
    positions = np.array([len(tokens) for tokens in context.history], np.int64)
    accepted, own = np.zeros((2, len(rules)), np.int64)
    coupled = np.array([rule == "coupled" for rule in rules])
    if coupled.any():
        rows = np.flatnonzero(coupled)
        part = whole.only(rows)
        row, depth = _unfold(part.keep + 1)
        keys = noise.token_keys(torch.from_numpy(rows[row]), torch.from_numpy(positions[rows][row] + depth), "own")
        accepted[rows], own[rows] = _follow(part, keys)
    if not coupled.all():
        rows = np.flatnonzero(~coupled)
        part = whole.only(rows)
        law = part.target
        if part.keep.any():
            judgement = judge(part, np.array([rules[b] == "block" for b in rows]))
            uniforms = np.ones(part.tokens.shape)
            row, depth = _unfold(part.keep)
            owner, place = torch.from_numpy(rows[row]), torch.from_numpy(positions[rows][row] + depth)
            uniforms[row, depth] = _array(noise.uniform(owner, place, "accept"))
            accepted[rows] = decide(judgement, uniforms)
            law = own_law(part, judgement, accepted[rows])
        after = torch.from_numpy(positions[rows] + accepted[rows])
        own[rows] = _array(law.pick(noise.uniform(torch.from_numpy(rows), after, "own")))
    return _verification(whole.tokens, accepted, own)


def _verify_greedy(draws: list[int], drafts: list[list[int]], keep: list[int]) -> Verification:
    """Drafts that are the target's own choice stay. draws [R], drafts [B, K]; plain lists are quickest for so few."""
    accepted, tokens, start = [], [], 0
    for row, count in zip(drafts, keep, strict=True):
        same = 0
        while same < count and row[same] == draws[start + same]:
            same += 1
        accepted.append(same)
        tokens.append([*row[:same], draws[start + same], *row[same:]])
        start += count + 1
    counts = torch.tensor(accepted)
    return Verification(counts, torch.tensor(tokens), counts + 1)


def truncate(tokens: Sequence[int], accepted: int, stop_ids: Collection[int], budget: int) -> tuple[list[int], int]:
    """One row's new tokens (accepted drafts, then the target's own) up to its first stop token, which stays, or up to
    ``budget`` of them. What comes after is neither committed nor counted. -> tokens, accepted drafts among them
    """
    length = min(accepted + 1, budget)
    length = next((i + 1 for i, token in enumerate(tokens[:length]) if token in stop_ids), length)
    return list(tokens[:length]), min(accepted, length)


# ------------------------------------------------------------------------------------------------ in the core

_RULES = {"coupled": 0, "rejection": 1, "block": 2}


def _for_the_core(target: Categorical, law: Law | None) -> tuple[Any, ...]:
    """The laws as the compiled core reads them, logits in float32 on a CPU; empty where it cannot."""
    mine = target.core_form if native is not None else None
    if mine is None:
        return ()
    if law is None:
        return mine, None
    drafter = law.core_form if isinstance(law, Categorical) else None
    return () if drafter is None else (mine, drafter)


def _verdict(
    forms: tuple[Any, ...], proposal: Proposal, keep: Tensor, context: Context, noise: RowNoise
) -> Verification:
    """``verify`` in one call. It looks at laws place by place and stops where the verdict is clear."""
    counts, drafts = keep.tolist(), proposal.tokens.shape[1]
    control, start = [], 0
    for b, (params, history, count) in enumerate(zip(context.params, context.history, counts, strict=True)):
        rule = _RULES[params.effective_rule] if params.temperature else 0  # cheapest for a sure token
        seed, round = noise.rows[b]
        control.append([start, b * drafts, count, rule, len(history), _signed(seed), round])
        start += count + 1
    assert len(forms[0][0]) == start, "one law for each kept draft and one more for each row"
    out = torch.empty(len(counts), drafts + 2, dtype=torch.int64)
    tokens = np.ascontiguousarray(proposal.tokens.numpy())
    try:
        native.verify(*forms, np.array(control), tokens, _PURPOSES, out.numpy())
    except ValueError as error:
        raise OutriderError(str(error)) from error
    accepted = out[:, 0]
    return Verification(accepted, out[:, 1:], accepted + 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


_PURPOSES = purpose_word("accept"), purpose_word("own"), purpose_word("", tokens=True)


# ------------------------------------------------------------------------------------------------ coupled and greedy


def match(round: Round, draws: _Ints) -> tuple[_Ints, _Ints]:
    """Drafts equal to the target's draw at their place, up to the first that is not. draws [R] -> accepted, own [B]."""
    depth = np.arange(round.tokens.shape[1])
    places = np.minimum(round.starts[:, None] + depth, len(draws) - 1)
    same = (round.tokens == draws[places]) & (depth < round.keep[:, None])
    accepted = np.logical_and.accumulate(same, 1).sum(1)
    return accepted, draws[round.starts + accepted]


def _follow(round: Round, keys: Tensor) -> tuple[_Ints, _Ints]:
    """``match`` with the target's own draws, keys int64 [R]; from a wide vocabulary only those that are needed."""
    target = round.target
    row, depth = _unfold(round.keep + 1)
    draws = np.full(len(target), -1)
    wide = target.ids is None and target.vocab_size > _WIDE
    wanted = depth == 0 if wide else np.ones(len(target), bool)
    while True:
        places = torch.from_numpy(np.flatnonzero(wanted))
        law, some = (target, keys) if len(places) == len(target) else (target.take(places), keys[places])
        draws[wanted] = _array(law.draw(some))
        accepted, own = match(round, draws)
        wanted = (depth == accepted[row]) & (draws < 0)  # the place after the accepted drafts, where not yet drawn
        if not wanted.any():
            return accepted, own


# ------------------------------------------------------------------------------------------------ rejection and block


def judge(round: Round, block: npt.NDArray[np.bool_]) -> Judgement:
    """The probability that decides about each draft. block [B]: rows under ``block``, the others under ``rejection``.

    ``rejection``: min(1, p(x_j) / q(x_j)), and the residual is norm(max(p - q, 0)).

    ``block``, equations 3 and 4 of the paper, with gamma = keep[b] and i drafts accepted: p_0 = 1,
    p_i = min(p_{i-1} p(x_i) / q(x_i), 1), the residual is norm(max(p_i p - q, 0)) of the laws that follow draft i, its
    mass before norming is S_i, and h_i = S_i / (S_i + 1 - p_i), h_gamma = p_gamma. i drafts are accepted where
    uniform i < h_i; the longest such i wins.
    """
    row, depth = _unfold(round.keep)
    tokens = round.tokens[row, depth]
    p, q = np.zeros((2, *round.tokens.shape))
    q[:] = 1.0
    if len(row):
        p[row, depth] = _probability(round.target, round.starts[row] + depth, tokens)
        if round.law is not None:
            q[row, depth] = _probability(round.law, round.drafted[row] + depth, tokens)
    ratio = p / np.maximum(q, _TINY)
    probability = np.minimum(ratio, 1)
    scale = np.ones((len(ratio), ratio.shape[1] + 1))
    if not block.any():
        return Judgement(probability, scale, block)

    for i in range(ratio.shape[1]):
        scale[block, i + 1] = np.minimum(scale[block, i] * ratio[block, i], 1)
    probability[block] = scale[block, 1:]  # right for the last kept draft, and 0 past it, where p is
    inner = block[row] & (depth > 0)  # drafts that follow another: there S_i of the i before it is wanted
    row, depth = row[inner], depth[inner]
    if len(row):
        weight = scale[row, depth]
        if round.law is None:
            mass = weight * (1 - p[row, depth])  # q is all on the draft, where weight * p <= 1
        else:
            mass = _array(_residual(round, row, depth, weight)[0].sum(1).double())
        short = mass + (1 - weight)
        # Both vanish where weight = 1 and p = q: the next draft is then accepted for certain, and with it this one.
        probability[row, depth - 1] = np.divide(mass, short, out=np.zeros_like(mass), where=short > 0)
    return Judgement(probability, scale, block)


def decide(judgement: Judgement, uniforms: _Floats) -> _Ints:
    """How many drafts each row keeps. uniforms in (0, 1), [B, K] -> [B]."""
    passed = uniforms < judgement.probability  # strictly: what has probability 0 never passes, not even at 0
    first = np.logical_and.accumulate(passed, 1).sum(1)  # rejection: up to the first that fails
    last = np.where(passed, np.arange(1, passed.shape[1] + 1), 0).max(1, initial=0)  # block: up to the last that passes
    return np.where(judgement.block, last, first)


def own_law(round: Round, judgement: Judgement, accepted: _Ints) -> Categorical:
    """The law of each row's own token after ``accepted[b]`` drafts: the target's where all were accepted, else the
    residual. Where rounding leaves a residual without mass, p and q agree to the last bits and the draft was rejected
    by those bits: the target's law is then right to the same precision. -> B places
    """
    rejected = accepted < round.keep
    places = torch.from_numpy(round.starts + accepted)
    if not rejected.any():
        return round.target.take(places)
    rows = np.arange(len(accepted))
    residual, ids = _residual(round, rows, accepted, judgement.scale[rows, accepted])
    mass = residual.sum(1, keepdim=True)
    use = torch.from_numpy(rejected)[:, None].to(mass.device) & (mass > 0)
    if use.all():
        return Categorical(round.target.vocab_size, probabilities=residual.div_(mass), ids=ids)
    plain = round.target.columns(places)[0]
    return Categorical(round.target.vocab_size, probabilities=torch.where(use, residual / mass, plain), ids=ids)


def _residual(round: Round, row: _Ints, depth: _Ints, weight: _Floats) -> tuple[Tensor, Tensor | None]:
    """max(weight * p - q, 0) after ``depth[i]`` drafts of row ``row[i]``; meaningless where that is all of them.

    -> [n, S] in the columns of the target's law, and the tokens they stand for, int64 [n, S] (None: column v is v).
    """
    mass, ids = round.target.columns(torch.from_numpy(round.starts[row] + depth))
    if (weight != 1).any():
        mass = mass.mul_(torch.from_numpy(weight).to(mass)[:, None])
    if round.law is None:  # q is all on the draft, and weight * p <= 1 there
        token = round.tokens[row, np.minimum(depth, round.tokens.shape[1] - 1)]
        draft = torch.from_numpy(np.where(depth < round.keep[row], token, 0))[:, None].to(mass.device)
        return mass.scatter_(1, draft, 0) if ids is None else mass.masked_fill_(ids == draft, 0), ids
    places = torch.from_numpy(np.minimum(round.drafted[row] + depth, len(round.law) - 1))
    q = round.law.dense(places) if ids is None else _lookup(round.law, places, ids)
    return (mass - q if q.dtype != mass.dtype else mass.sub_(q)).clamp_min_(0), ids


# ------------------------------------------------------------------------------------------------ small things


def _lookup(law: Law, places: Tensor, ids: Tensor) -> Tensor:
    """Probabilities of ``ids`` [n, S'] (V: no token) at ``places`` [n]."""
    if isinstance(law, Categorical):
        return law.lookup(places, ids)
    rows = law.dense(places)
    inside = rows.gather(1, ids.clamp_max(rows.shape[1] - 1))
    return torch.where(ids < rows.shape[1], inside, 0)


def _probability(law: Law, places: _Ints, tokens: _Ints) -> _Floats:
    """Probability of ``tokens[i]`` at ``places[i]``."""
    index, ids = torch.from_numpy(places), torch.from_numpy(tokens)
    found = law.at(ids, index) if isinstance(law, Categorical) else _lookup(law, index, ids[:, None])[:, 0]
    return _array(found.double())


def _unfold(counts: _Ints) -> tuple[_Ints, _Ints]:
    """For every item of rows with so many items each: its row, and its index in the row."""
    row, index = np.nonzero(np.arange(counts.max(initial=0)) < counts[:, None])
    return row, index


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    return tensor.cpu().numpy()


def _verification(drafts: _Ints, accepted: _Ints, own: _Ints) -> Verification:
    tokens = np.concatenate([drafts, own[:, None]], 1)
    tokens[np.arange(len(own)), accepted] = own
    return Verification(torch.from_numpy(accepted), torch.from_numpy(tokens), torch.from_numpy(accepted + 1))
