"""One request in an engine: what was asked, what is committed so far, and the events its reader has not seen yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from outrider.config import SamplingParams
from outrider.engine.finisher import Finisher
from outrider.engine.predicted_text import PredictedText
from outrider.errors import InvalidRequest, OutriderError
from outrider.types import DraftReport, Event, RequestStats, TargetSpec, TokenLogprobs

__all__ = ["Commit", "Request", "check_request", "sampling_error"]


@dataclass(eq=False, slots=True)
class Request:
    """One sequence. Only ``Commit.apply`` and the engine's step change it."""

    number: int  # unique in its engine, in order of submission
    index: int  # the caller's own number, which its events carry
    params: SamplingParams
    seed: int
    finisher: Finisher
    history: list[int]  # prompt and output; the last one is the token to go on from
    prompt_length: int
    pending: int  # tokens at the end of ``history`` whose keys and values are not in the cache, while it has a slot
    slot: int = -1  # in the cache; -1: waiting
    followed: bool = False  # the drafter has seen all of its committed tokens, and can draft for it
    drafter_failed: bool = False  # on this request: it is not asked again
    round: int = 0
    started: float = 0.0  # perf_counter; 0: never in a step
    cancelled: str | None = None  # the reason, set from any thread; the engine's next step acts on it
    finish_reason: str | None = None
    error: Exception | None = None  # why it failed, with finish_reason "error"
    stats: RequestStats = field(default_factory=RequestStats)
    events: list[Event] = field(default_factory=list)  # one a commit; only grows
    predicted: PredictedText | None = None  # drafts of its own, which come before the drafter's

    @property
    def output(self) -> list[int]:
        return self.history[self.prompt_length :]

    @property
    def text(self) -> str:
        """The text so far, up to what may still turn out to be part of a stop string."""
        return "".join(event.text for event in self.events)

    @property
    def left(self) -> int:
        """Tokens that may still be committed."""
        return self.params.max_tokens - (len(self.history) - self.prompt_length)


class Commit(NamedTuple):
    """New tokens of one request, ready to be applied: accepted drafts, then the bonus token unless the text ended.

    Applying it twice is the same as applying it once, so a step that was interrupted while it committed is completed
    by applying all of its commits again.
    """

    request: Request
    start: int  # len(history) before
    tokens: list[int]
    accepted: int
    round: int  # of the request, after
    stats: RequestStats
    event: Event
    event_index: int
    error: Exception | None = None  # what ends the request instead of its text

    @staticmethod
    def of(
        request: Request,
        verified: int,
        tokens: list[int],
        accepted: int,
        seconds: float,
        logprobs: Sequence[TokenLogprobs] = (),
        drafts: Sequence[DraftReport] = (),
    ) -> Commit:
        """Let the request's finisher decide what of ``tokens`` is text. ``verified``: drafts that were checked.
        ``logprobs``: of each token, or none; ``drafts``: of each accepted draft, or none."""
        end = request.finisher.take(tokens, accepted, request.left)
        old, counts = request.stats, bool(request.round)  # the first token comes from the prompt's own pass
        stats = RequestStats(
            old.rounds + counts,
            old.drafted + counts * verified,
            old.accepted + counts * end.accepted,
            old.generated + len(end.tokens),
            seconds,
            _counted(old.accepted_per_position, counts * end.accepted),
            _counted(old.drafted_per_position, counts * verified),
            old.cached_tokens,
        )
        pieces = end.pieces
        if logprobs:
            pieces = tuple(
                piece._replace(logprobs=one, draft=drafts[i] if i < len(drafts) else None)
                for i, (piece, one) in enumerate(zip(pieces, logprobs, strict=False))
            )
        failed = end.reason == "error"
        event = Event(request.index, pieces, None if failed else end.reason)
        error = InvalidRequest(request.finisher.failure) if failed else None
        start, index = len(request.history), len(request.events)
        return Commit(request, start, end.tokens, end.accepted, request.round + 1, stats, event, index, error)

    def apply(self) -> None:
        request = self.request
        request.history[self.start :] = self.tokens
        request.pending = 1
        request.round = self.round
        request.stats = self.stats
        request.events[self.event_index :] = [self.event]
        request.error = self.error
        request.finish_reason = self.event.finish_reason if self.error is None else "error"


def check_request(spec: TargetSpec, prompt: Sequence[int], params: SamplingParams) -> None:
    """Raise InvalidRequest for a request that a target cannot run."""
    if not prompt:
        raise InvalidRequest("the prompt is empty: got 0 tokens, expected at least 1")
    if not 0 <= min(prompt) <= max(prompt) < spec.vocab_size:
        raise InvalidRequest(
            f"prompt token ids must be between 0 and {spec.vocab_size - 1}, got {min(prompt)} to {max(prompt)}"
        )
    if len(prompt) + params.max_tokens > spec.max_positions:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}: together they pass the "
            f"context of {spec.max_positions} tokens; shorten the prompt or lower max_tokens"
        )
    wrong = [token for token, _ in params.logit_bias if token >= spec.vocab_size]
    if wrong:
        raise InvalidRequest(
            f"logit_bias names token {wrong[0]}, but the vocabulary has ids 0 to {spec.vocab_size - 1}; remove it"
        )
    if sum(bias == -math.inf for _, bias in params.logit_bias) == spec.vocab_size:
        raise InvalidRequest("logit_bias forbids every token of the vocabulary; leave at least one")


def sampling_error(request: Request, finite: bool) -> OutriderError:
    """Why a request's logits cannot be sampled from. ``finite``: the target's own logits are numbers."""
    if not finite:
        return OutriderError(
            f"the target's logits are NaN or infinite after {len(request.history)} tokens: its weights or its config "
            "are damaged, or its dtype is too narrow for it; check the files, or try dtype='float32'"
        )
    names = ("logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty", "temperature")
    values = ", ".join(f"{name}={getattr(request.params, name)!r}"[:80] for name in names)
    return InvalidRequest(
        f"the request's sampling options leave no token a finite logit, got {values}; allow at least one token, with "
        "smaller values"
    )


def _counted(counts: list[int], n: int) -> list[int]:
    """``counts`` with one more at each of the first ``n`` positions; a new list, unless nothing changes."""
    if not n:
        return counts
    new = [*counts, *[0] * (n - len(counts))]
    for j in range(n):
        new[j] += 1
    return new
