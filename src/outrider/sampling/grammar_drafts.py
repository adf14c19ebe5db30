"""Drafts of rows with a grammar: cut where nothing of them can be accepted, and lengthened by what the grammar forces.

A draft that was sampled under ``rejection`` or ``block`` is not cut *at* a forbidden token: its length would depend on
what was sampled, which changes the distribution (DSpark, Appendix A). Such drafts are drawn from the masked
distribution. What is cut everywhere is what lies *behind* a forbidden token or behind the end of the grammar: that
depends on the tokens before the cut alone. Drafts that were not sampled, and all drafts of rows whose text does not
depend on how much is verified (greedy and ``coupled``), are free: they are cut at the forbidden token and go on with
the tokens that are the only ones possible, which are accepted for certain and cost no drafting.

Legend: B rows, K drafts at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from outrider.sampling.added_drafts import relaid
from outrider.sampling.grammar import GrammarMatcher
from outrider.types import Context, Proposal

__all__ = ["fit_drafts", "to_draft"]


def to_draft(matchers: Sequence[GrammarMatcher | None], limits: Sequence[int]) -> list[int]:
    """Drafts to ask the drafter for: none of a row whose next ``limits[b]`` tokens are all forced. [B] -> B"""
    return [
        0 if matcher is not None and len(_forced(matcher, (), limit)) == limit else limit
        for matcher, limit in zip(matchers, limits, strict=True)
    ]


def fit_drafts(
    proposal: Proposal, matchers: Sequence[GrammarMatcher | None], limits: Sequence[int], context: Context
) -> Proposal:
    """The proposal as the rows' grammars have it. ``limits`` [B]: the most tokens of each row."""
    tokens, lengths = proposal.arrays[0].tolist(), proposal.counts
    given = None if proposal.confidence is None else proposal.confidence.tolist()
    rows = []
    for b, (matcher, limit, params) in enumerate(zip(matchers, limits, context.params, strict=False)):
        known = [1.0] * lengths[b] if given is None else given[b][: lengths[b]]
        row = _Row(tokens[b][: lengths[b]], known, kept=lengths[b])
        if matcher is not None:
            sampled = proposal.distribution is not None and params.temperature > 0
            row.needs_distribution = sampled and params.effective_rule != "coupled"
            _fit(row, matcher, limit)
        rows.append(row)
    width = max(len(row.tokens) for row in rows)
    shape = len(rows), width
    distribution, forced = proposal.distribution, {b: row.tokens for b, row in enumerate(rows) if row.forced}
    if distribution is not None and (width != proposal.width or any(forced.values())):
        distribution = relaid(distribution, len(rows), proposal.width, width, forced)
    return Proposal(
        torch.tensor([row.tokens + [0] * (width - len(row.tokens)) for row in rows], dtype=torch.int64).view(shape),
        [len(row.tokens) for row in rows],
        distribution,
        None
        if given is None and any(lengths)
        else torch.tensor([row.confidence + [0.0] * (width - len(row.tokens)) for row in rows]).view(shape),
        sampled=[min(row.kept, n) for row, n in zip(rows, proposal.sampled or lengths, strict=True)],
    )


@dataclass(slots=True)
class _Row:
    """The drafts of one row."""

    tokens: list[int]
    confidence: list[float]
    kept: int = 0  # of the drafter's
    needs_distribution: bool = False  # its drafts were sampled, and the rule compares distributions
    forced: bool = False  # they are all forced, in place of none


def _fit(row: _Row, matcher: GrammarMatcher, limit: int) -> None:
    """Cut a row's drafts, and lengthen them up to ``limit``; tokens that are the only ones possible are certain."""
    row.forced = row.needs_distribution and not row.tokens
    row.kept = 0
    for j, token in enumerate(row.tokens):
        before = tuple(row.tokens[:j])
        mask = matcher.mask(before)
        if mask is None or not (row.needs_distribution or matcher.allows(before, token)):
            break
        row.kept = j + 1
        if matcher.only(before) == token:
            row.confidence[j] = 1.0
    del row.tokens[row.kept :], row.confidence[row.kept :]
    if not row.needs_distribution or row.forced:
        more = _forced(matcher, tuple(row.tokens), limit - row.kept)
        row.tokens += more
        row.confidence += [1.0] * len(more)


def _forced(matcher: GrammarMatcher, drafts: tuple[int, ...], most: int) -> list[int]:
    """The next tokens after these drafts, at most ``most``, while each is the only one possible."""
    found: list[int] = []
    while len(found) < most and (token := matcher.only((*drafts, *found))) is not None:
        found.append(token)
    return found
