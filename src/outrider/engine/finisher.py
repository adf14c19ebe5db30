"""Where a text ends: the only place that decides it, before anything is committed.

A text ends at a stop id (which stays, without text), at the token that completes a stop string (of which no part is
text), where its grammar ends, or at its budget. What was drafted or verified behind its end is neither committed nor
counted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from outrider.sampling.grammar import GrammarMatcher
from outrider.tokenization.tokenizer import Detokenizer, StopMatcher, Tokenizer
from outrider.types import Piece

__all__ = ["End", "Finisher"]


class End(NamedTuple):
    """What of a round's tokens is text."""

    tokens: list[int]
    accepted: int  # drafts among them
    pieces: tuple[Piece, ...]  # one a token
    reason: str | None  # "stop" | "length" | "error": the next token breaks the grammar; None: the text goes on


@dataclass(slots=True)
class Finisher:
    """One request's. It remembers text that is not certain yet, so tokens are taken once each, in order."""

    stop_ids: Collection[int]
    stop: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None  # None: pieces have no text, and stop strings cannot be asked for
    prompt_tail: tuple[int, ...] = ()
    grammar: GrammarMatcher | None = None
    _detokenizer: Detokenizer | None = None
    _matcher: StopMatcher | None = None

    def __post_init__(self) -> None:
        assert self.tokenizer is not None or not self.stop, "stop strings need a tokenizer"
        if self.tokenizer is not None:
            self._detokenizer = Detokenizer(self.tokenizer, self.prompt_tail)
            self._matcher = StopMatcher(self.stop) if self.stop else None

    def fresh(self) -> Finisher:
        """The same before its first token: what an interrupted step replays the committed tokens into."""
        grammar = None if self.grammar is None else self.grammar.fresh()
        return Finisher(self.stop_ids, self.stop, self.tokenizer, self.prompt_tail, grammar)

    def take(self, tokens: Sequence[int], accepted: int, budget: int) -> End:
        """The next tokens of the sequence: ``accepted`` drafts, then the bonus token; at most ``budget`` are text."""
        pieces: list[Piece] = []
        reason = None
        grammar, detokenizer, matcher = self.grammar, self._detokenizer, self._matcher
        new = list(tokens[: accepted + 1])
        for token in new:
            if grammar is not None and not grammar.consume(token):
                reason = "error"
                break
            text = ""
            if token in self.stop_ids:
                reason = "stop"
            elif detokenizer is not None:
                text = detokenizer.push(token)
                if matcher is not None:
                    text = matcher.push(text)
                    if matcher.stopped:
                        reason = "stop"
            if grammar is not None and grammar.ended:
                reason = "stop"
            elif reason is None and len(pieces) + 1 == budget:
                reason = "length"
            if reason is not None:
                pieces.append(Piece(token, text + self._flush(), len(pieces) < accepted))
                break
            pieces.append(Piece(token, text, len(pieces) < accepted))
        del new[len(pieces) :]
        return End(new, accepted if accepted < len(new) else len(new), tuple(pieces), reason)

    @property
    def failure(self) -> str:
        """Why the grammar allowed no token."""
        reason = self.grammar.failure if self.grammar is not None else None
        return f"{reason}; simplify it, or allow more tokens"

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text."""
        return None if self._matcher is None else self._matcher.matched

    def _flush(self) -> str:
        """Text that was held back, once the sequence has ended."""
        matcher = self._matcher
        if self._detokenizer is None or (matcher is not None and matcher.stopped):
            return ""
        rest = self._detokenizer.flush()
        if matcher is None:
            return rest
        rest = matcher.push(rest)
        return rest if matcher.stopped else rest + matcher.flush()
