"""Suffix drafting: the most frequent continuation of the longest context seen before.

Contexts come from the row itself (prompt and output) and from earlier outputs of this process. After SuffixDecoding
(Oliaro et al., arXiv 2411.04975, section 4), with a suffix automaton (Blumer et al. 1985) instead of suffix trees:
one state per class of contexts with the same occurrences, at most two per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from outrider.errors import InvalidRequest
from outrider.types import Context, Proposal, RaggedBatch, Rng, TargetModel, Values

__all__ = ["SuffixAutomaton", "SuffixConfig", "SuffixDrafter"]

ROOT = 0
COUNT_BITS = 32  # an edge is one int, state << COUNT_BITS | count: half the memory of two dictionaries
COUNT_MASK = (1 << COUNT_BITS) - 1
COUNTED = 32  # contexts, longest first, that count a token: keeps an append O(1) where the text is one long loop


@dataclass(frozen=True, slots=True)
class SuffixConfig:
    """Options of the ``suffix`` drafter. Raises InvalidRequest for values out of range."""

    draft_tokens: int = 8
    """The most tokens it proposes in a round."""
    min_survival: float = 0.15
    """Stop before a token that is reached and right with a smaller probability: the product of the confidences."""
    min_match: int = 1
    """Least tokens of context to draft from."""
    max_match: int = 24
    """Most tokens of context looked up among earlier outputs; the row's own text has no such bound."""
    stored_tokens: int = 32768
    """Most tokens of earlier outputs kept, the oldest dropped first; 0 keeps rows apart. About 0.5 kB each."""

    def __post_init__(self) -> None:
        for name in ("draft_tokens", "min_match", "max_match"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"drafter suffix: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.min_survival <= 1:
            raise InvalidRequest(f"drafter suffix: min_survival must be between 0 and 1, got {self.min_survival}")
        if self.stored_tokens < 0:
            raise InvalidRequest(f"drafter suffix: stored_tokens must be at least 0, got {self.stored_tokens}")


class SuffixAutomaton:
    """Every context of some texts, and how often each token followed it. Appending is O(1) amortised.

    A state stands for all contexts that end at the same positions; ``length`` is that of the longest. ``link`` leads
    to the longest of its suffixes that ends at more positions, so the link of the newest state is the longest context
    at the end of the text that occurred before.
    """

    __slots__ = ("_best", "_edges", "_last", "_length", "_link", "_total", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self._edges: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._total = [0]  # tokens that followed, the sum of the edges' counts
        self._best = [-1]  # the most frequent of them, the latest among equals
        self._last = ROOT

    @property
    def states(self) -> int:
        return len(self._edges)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the current text."""
        for token in tokens:
            self._append(token)
        self.tokens += len(tokens)

    def restart(self) -> None:
        """Begin another text: no context spans the two."""
        self._last = ROOT

    def end(self) -> tuple[int, int]:
        """State and length of the longest context at the end of the text that occurred before."""
        state = max(self._link[self._last], ROOT)
        return state, self._length[state]

    def find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """State and length of the longest suffix of ``tokens`` that occurs in the texts."""
        state, matched = ROOT, 0
        for token in tokens:
            while token not in self._edges[state] and state != ROOT:
                state = self._link[state]
                matched = self._length[state]
            if token in self._edges[state]:
                state = self._edges[state][token] >> COUNT_BITS
                matched += 1
        return state, matched

    def best(self, state: int) -> tuple[int, float]:
        """The most frequent token after a state's contexts and its share; (-1, 0.0) where nothing followed."""
        token = self._best[state]
        return (token, (self._edges[state][token] & COUNT_MASK) / self._total[state]) if token >= 0 else (-1, 0.0)

    def draft(self, state: int, matched: int, most: int, config: SuffixConfig) -> tuple[list[int], list[float]]:
        """Follow the most frequent branch for up to ``most`` tokens.

        Whether token j is drafted, and its confidence, are read off the state before it. Confidence is the
        branch's frequency times m / (m + 2) where m tokens of context agreed: a third for one token, nine tenths for
        18, as in greedy answers of SmolLM2. (Laplace's rule of succession, (m + 1) / (m + 2), is twice as sure of
        short contexts as it should be.)
        """
        drafted: list[int] = []
        confidence: list[float] = []
        survival = 1.0
        edges, total, best = self._edges, self._total, self._best  # locals: this runs for every draft of every row
        least, wanted = config.min_survival, config.min_match
        while len(drafted) < most and matched >= wanted:
            token = best[state]
            if token < 0:  # the tip of the text: go on from a shorter context that has a continuation
                state = self._link[state]
                matched = self._length[state]
                continue
            edge = edges[state][token]
            probability = (edge & COUNT_MASK) / total[state] * matched / (matched + 2)
            survival *= probability
            if survival < least:
                break
            drafted.append(token)
            confidence.append(probability)
            state = edge >> COUNT_BITS
            matched += 1
        return drafted, confidence

    def _append(self, token: int) -> None:
        edges, link = self._edges, self._link
        state = self._last
        if token in edges[state]:  # only after ``restart``: this text has so far repeated another
            self._last = self._exact(state, token)
        else:
            newest = self._new_state(self._length[state] + 1, {}, ROOT, 0, -1)
            while state >= 0 and token not in edges[state]:
                edges[state][token] = newest << COUNT_BITS | 1
                self._total[state] += 1
                if self._total[state] == 1 or edges[state][self._best[state]] & COUNT_MASK == 1:
                    self._best[state] = token
                state = link[state]
            if state >= 0:
                link[newest] = self._exact(state, token)
            self._last = newest
        total, best = self._total, self._best
        for _ in range(COUNTED):
            if state < 0:
                break
            following = edges[state]
            edge = following[token] = following[token] + 1
            total[state] += 1
            if best[state] != token and edge & COUNT_MASK >= following[best[state]] & COUNT_MASK:
                best[state] = token
            state = link[state]

    def _exact(self, state: int, token: int) -> int:
        """The state whose longest context is ``state``'s followed by ``token``; split off where it shares one."""
        target = self._edges[state][token] >> COUNT_BITS
        if self._length[target] == self._length[state] + 1:
            return target
        split = self._new_state(
            self._length[state] + 1,
            self._edges[target].copy(),
            self._link[target],
            self._total[target],
            self._best[target],
        )
        self._link[target] = split
        while state >= 0 and self._edges[state].get(token, -1) >> COUNT_BITS == target:
            self._edges[state][token] = split << COUNT_BITS | self._edges[state][token] & COUNT_MASK
            state = self._link[state]
        return split

    def _new_state(self, length: int, edges: dict[int, int], link: int, total: int, best: int) -> int:
        self._edges.append(edges)
        self._length.append(length)
        self._link.append(link)
        self._total.append(total)
        self._best.append(best)
        return len(self._edges) - 1


class _Archive:
    """Earlier outputs, in two generations of half the budget: an automaton cannot forget, so the older one goes."""

    def __init__(self, budget: int) -> None:
        self._half = budget // 2
        self.generations = (SuffixAutomaton(), SuffixAutomaton())  # young, old

    def add(self, tokens: list[int]) -> None:
        tokens = tokens[-self._half :] if self._half else []
        young = self.generations[0]
        if young.tokens + len(tokens) > self._half:
            young = SuffixAutomaton()
            self.generations = (young, self.generations[0])
        young.restart()
        young.extend(tokens)


@dataclass(slots=True)
class _Row:
    automaton: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    tokens: list[int] = field(default_factory=list)  # what the automaton has read
    prompt_length: int | None = None  # known from the first proposal on

    def read(self, start: int, tokens: list[int]) -> None:
        """Take in committed tokens from position ``start`` on; those read before are skipped."""
        if start <= len(self.tokens):  # after a hole: the next proposal's history fills it
            new = tokens[len(self.tokens) - start :]
            self.automaton.extend(new)
            self.tokens += new


class SuffixDrafter:
    """Drafts from the row's own text or from earlier outputs, whichever is surer of its first token.

    Deterministic: the frequencies are a confidence, not a distribution. Which outputs were stored before changes what
    is proposed, never the text.
    """

    Config = SuffixConfig
    aux_layers: tuple[int, ...] = ()

    def __init__(self, config: SuffixConfig) -> None:
        self.block = config.draft_tokens
        self._config = config
        self._archive = _Archive(config.stored_tokens)
        self._rows: dict[int, _Row] = {}

    @classmethod
    def from_config(cls, config: SuffixConfig, target: TargetModel, **services: Any) -> SuffixDrafter:
        return cls(config)

    @property
    def stored_tokens(self) -> int:
        """Tokens of earlier outputs that are held now."""
        return sum(generation.tokens for generation in self._archive.generations)

    def open(self, slot: int, capacity: int) -> None:
        self._rows[slot] = _Row()

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        drafts: list[list[int]] = []
        confidence: list[list[float]] = []
        for b, (slot, most) in enumerate(zip(slots, limit, strict=True)):
            row, history = self._rows[slot], context.history[b]
            row.prompt_length = context.prompt_lengths[b]
            row.read(len(row.tokens), history[len(row.tokens) :])
            tokens, probabilities = self._draft(row, min(most, self.block))
            drafts.append(tokens)
            confidence.append(probabilities)
        return Proposal.pack(drafts, confidence)

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        """Read prompts as they come, so that the first proposal need not, and what plain rounds commit."""
        tokens, positions, slots, offsets = batch.lists
        for slot, start, end in zip(slots, offsets, offsets[1:], strict=False):
            if start < end:
                self._rows[slot].read(positions[start], tokens[start:end])

    def reset_rows(self) -> None:
        """Close all slots at once."""
        self._rows.clear()

    def close(self, slot: int) -> None:
        row = self._rows.pop(slot)
        if row.prompt_length is not None:
            self._archive.add(row.tokens[row.prompt_length :])

    def forget(self) -> None:
        """Drop all earlier outputs."""
        self._archive = _Archive(self._config.stored_tokens)

    def _draft(self, row: _Row, most: int) -> tuple[list[int], list[float]]:
        if most <= 0:
            return [], []
        recent = row.tokens[-self._config.max_match :]
        found = [(row.automaton, *row.automaton.end())]
        found += [(earlier, *earlier.find(recent)) for earlier in self._archive.generations if earlier.tokens]
        # Chosen by the first token alone: a longer limit must not change what a shorter one proposes.
        drafts = [automaton.draft(state, matched, most, self._config) for automaton, state, matched in found]
        return max(drafts, key=lambda draft: draft[1][:1])
