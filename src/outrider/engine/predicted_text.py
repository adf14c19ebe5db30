"""An expected text as a source of drafts: where the output follows it, what comes next is proposed."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence

__all__ = ["CONFIDENCE", "PredictedText"]

CONFIDENCE = 0.9  # of its drafts; clients send a text because most of it comes back
MATCH = 3  # tokens that must agree for the output to be found again after it left the text


class PredictedText:
    """One request's. It reads the request's history, which only grows."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)
        self._next: int | None = 0  # what should come next; None: the output is not in the text
        self._read = 0  # tokens of the output that are known
        self._ends: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for end in range(MATCH, len(self._tokens) + 1):
            self._ends[tuple(self._tokens[end - MATCH : end])].append(end)
        self._latest = 0  # the last position that was in use

    def drafts(self, history: Sequence[int], prompt_length: int, most: int) -> list[int]:
        """The next tokens of the text, at most ``most``; none where the output is not in it."""
        for at in range(prompt_length + self._read, len(history)):
            self._follow(history, at, prompt_length)
        self._read = len(history) - prompt_length
        return [] if self._next is None or most <= 0 else self._tokens[self._next : self._next + most]

    def _follow(self, history: Sequence[int], at: int, prompt_length: int) -> None:
        if self._next is not None and self._next < len(self._tokens) and self._tokens[self._next] == history[at]:
            self._next += 1
            self._latest = self._next
            return
        self._next = None
        first = at + 1 - MATCH
        if first >= prompt_length and (ends := self._ends.get(tuple(history[first : at + 1]))):
            # The nearest one behind what was in use: an edit leaves out or adds, and goes on in order.
            self._next = ends[min(bisect_left(ends, self._latest), len(ends) - 1)]
            self._latest = self._next
