"""An audit of somebody else's OpenAI-compatible server, alone or against a baseline: speculation on against off.

*Own log-probabilities* (the default, and the strongest here): sampled at temperature 1, tokens must be distributed as
the server itself says. *Two samples*: answers of both servers, by the tests of ``two_sample``. *Greedy*: the same text
from both, where a difference between two tokens whose log-probabilities are close is a near-tie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from outrider.errors import OutriderError
from outrider.proof.alternatives import Bets
from outrider.proof.certificate import Check
from outrider.proof.completion_server import Completion, CompletionServer, SampledToken
from outrider.proof.evidence import Budget
from outrider.proof.two_sample import counts, first_token, mmd

__all__ = ["METHOD", "ServerAudit", "add_tokens"]

METHOD = (
    "Greedy answers must be equal token for token; where they part, log-probabilities closer than a bound make it a "
    "near-tie. Sampled answers: the likelihood of the tokens under the server's own log-probabilities against that "
    "under other temperatures, truncations and partly greedy decoding, by e-values that may be looked at at any time;"
    " against a baseline also maximum mean discrepancy (arXiv 2410.20247), near-tied prompts (2602.11083) and first-"
    "token log-probabilities (2512.03816), by permutation. The false-alarm rate over all of them is at most 1e-3."
)
Floats = npt.NDArray[np.float64]
TOP = (20, 5)
"""How many of the likeliest tokens a server is asked to tell: more find a truncation sooner, 5 is what all allow."""
NEAR_TIE = 0.1
"""Difference of log-probability that rounding in 16 bits explains."""
SAME = 0.02
"""Mean difference of first-token log-probabilities that is rounding and not tested."""
SAME_LOGPROB = 1e-3
"""Two log-probabilities of one token, as they are written."""
BORDER = 0.3
"""Difference of log-probability of a near-tied prompt's two likeliest tokens, at most."""


@dataclass(frozen=True)
class ServerAudit:
    """What to ask of a server."""

    server: CompletionServer
    baseline: CompletionServer | None
    prompts: tuple[str, ...]
    max_tokens: int = 64
    tokens: int = 20_000
    """Most sampled tokens for the test of own log-probabilities."""
    answers: int = 10
    """To each prompt, for maximum mean discrepancy."""
    tied_answers: int = 20
    """To each near-tied prompt."""
    greedy_prompts: int = 12
    seed: int = 0

    @cached_property
    def top(self) -> int:
        """Of ``TOP``, what both servers give."""
        for server in (self.server, self.baseline):
            if server is not None:
                try:
                    server.complete(self.prompts[0], max_tokens=1, temperature=0.0, logprobs=TOP[0])
                except OutriderError:
                    return TOP[1]
        return TOP[0]

    @cached_property
    def budget(self) -> Budget:
        return Budget(2 if self.baseline is None else 5)

    def checks(self) -> Iterator[Check]:
        """One after the other, the cheap ones first."""
        greedy = self._greedy(self.server)
        yield self._usage(greedy)
        again = self.baseline or self.server
        yield self._equality(greedy, self._greedy(again), "the baseline's" if self.baseline else "its own, asked again")
        yield self._seeds()
        has_logprobs = all(answer.tokens for answer in greedy)
        if has_logprobs:
            yield self._own_logprobs(self.server, "own log-probabilities")
        if self.baseline is None:
            if not has_logprobs:
                yield Check("own log-probabilities", False, "the server gives none; a baseline is needed to test it")
            return
        if has_logprobs:
            yield self._first_tokens(self.baseline)
            yield self._near_tied(self.baseline)
        yield self._mmd(self.baseline)

    # ---------------------------------------------------------------- greedy

    def _greedy(self, server: CompletionServer) -> list[Completion]:
        prompts = self.prompts[: self.greedy_prompts]
        return server.many(
            prompts, [None] * len(prompts), max_tokens=self.max_tokens, temperature=0.0, logprobs=self.top
        )

    def _usage(self, answers: Sequence[Completion]) -> Check:
        """What the server counts is what it gives."""
        wrong = []
        for i, answer in enumerate(answers):
            told = answer.usage.get("completion_tokens")
            given = None if answer.tokens is None else len(answer.tokens)
            if told is not None and (told > self.max_tokens or (given is not None and abs(told - given) > 1)):
                wrong.append(f"prompt {i + 1}: {told} completion tokens stated, {given} given, {self.max_tokens} asked")
        missing = sum("completion_tokens" not in answer.usage for answer in answers)
        found = wrong[0] if wrong else f"{len(answers)} answers, {missing} without usage"
        return Check("usage", not wrong, found)

    def _equality(self, ours: Sequence[Completion], theirs: Sequence[Completion], whose: str) -> Check:
        faults, near, equal = [], 0, 0
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a.text == b.text:
                equal += 1
                continue
            gap = _gap(a.tokens, b.tokens)
            if gap is not None and gap <= NEAR_TIE:
                near += 1
            else:
                apart = "no log-probabilities" if gap is None else f"log-probabilities {gap:.2g} apart"
                faults.append(f"prompt {i + 1} ({apart})")
        found = f"{equal} of {len(ours)} texts equal, {near} near-ties, {len(faults)} faults"
        figures = {"texts": len(ours), "equal": equal, "near_ties": near, "faults": len(faults)}
        return Check(f"greedy text equals {whose}", not faults, "; ".join([found, *faults[:2]]), figures)

    def _seeds(self) -> Check:
        """Different seeds must give different texts; whether the same seed repeats is told, not required."""
        prompt, options = self.prompts[0], {"max_tokens": self.max_tokens, "temperature": 1.0}
        answers = self.server.many([prompt] * 4, [1, 1, 2, 3], **options)
        texts = [answer.text for answer in answers]
        repeats = "repeats" if texts[0] == texts[1] else "does not repeat"
        return Check("seeds", len(set(texts[1:])) > 1, f"{len(set(texts[1:]))} texts from 3 seeds; a seed {repeats}")

    # ---------------------------------------------------------------- sampled

    def _own_logprobs(self, server: CompletionServer, name: str) -> Check:
        bets, asked = Bets(), 0
        threshold = self.budget.threshold
        while bets.samples < self.tokens and bets.log_value < threshold:
            prompts = [self.prompts[(asked + i) % len(self.prompts)] for i in range(16)]
            seeds = [(self.seed << 20) + asked + i for i in range(len(prompts))]
            asked += len(prompts)
            before = bets.samples
            for answer in server.many(
                prompts, list(seeds), max_tokens=self.max_tokens, temperature=1.0, logprobs=self.top
            ):
                if answer.tokens:
                    add_tokens(bets, answer.tokens)
            if bets.samples == before:
                return Check(name, False, "the server gave no log-probabilities of sampled tokens")
        alternative, evidence = bets.best
        figures = {
            "samples": bets.samples,
            "requests": asked,
            "log_evidence": round(bets.log_value, 3),
            "log_threshold": round(threshold, 3),
            "likeliest_alternative": alternative,
        }
        if bets.log_value >= threshold:
            found = f"rejected after {bets.samples} tokens; best explained by {alternative} (evidence e^{evidence:.0f})"
            return Check(name, False, found, figures)
        return Check(name, True, f"{bets.samples} tokens of {asked} answers, nothing found", figures)

    def _answers(self, server: CompletionServer, offset: int) -> list[list[str]]:
        """``answers`` sampled texts of each prompt."""
        prompts = [prompt for prompt in self.prompts for _ in range(self.answers)]
        seeds = [(self.seed << 20) + offset + i for i in range(len(prompts))]
        found = server.many(prompts, list(seeds), max_tokens=self.max_tokens, temperature=1.0)
        return [[answer.text for answer in found[i : i + self.answers]] for i in range(0, len(found), self.answers)]

    def _mmd(self, baseline: CompletionServer) -> Check:
        value, p = mmd(self._answers(self.server, 500_000), self._answers(baseline, 700_000), seed=self.seed)
        return self._p_check("sampled text, maximum mean discrepancy", value, p, 2 * len(self.prompts) * self.answers)

    def _near_tied(self, baseline: CompletionServer) -> Check:
        """Prompts after which two tokens are about as likely; each server samples the next token."""
        borders = []
        for prompt, answer in zip(self.prompts, self._greedy(baseline), strict=False):
            text = prompt
            for token in (answer.tokens or ())[:-1]:
                if len(token.top) > 1 and token.top[0][1] - token.top[1][1] < BORDER and "\ufffd" not in text:
                    borders.append(text)
                text += token.text
        borders = borders[:: max(1, len(borders) // 12)][:12]
        if not borders:
            return Check("near-tied prompts", True, "none found")
        repeats = self.tied_answers
        samples = []
        for offset, server in ((0, self.server), (900_000, baseline)):
            asked = [prompt for prompt in borders for _ in range(repeats)]
            seeds = [(self.seed << 20) + 300_000 + offset + i for i in range(len(asked))]
            found = server.many(asked, list(seeds), max_tokens=2, temperature=1.0)
            samples.append([[a.text for a in found[i : i + repeats]] for i in range(0, len(found), repeats)])
        value, p = counts(samples[0], samples[1], seed=self.seed)
        return self._p_check("sampled tokens after near-tied prompts", value, p, 2 * len(borders) * repeats)

    def _first_tokens(self, baseline: CompletionServer) -> Check:
        """Log-probabilities of the baseline's likeliest first token."""
        repeats = 4
        prompts = [prompt for prompt in self.prompts[: self.greedy_prompts] for _ in range(repeats)]
        both = [
            server.many(prompts, [None] * len(prompts), max_tokens=1, temperature=0.0, logprobs=self.top)
            for server in (self.server, baseline)
        ]
        wanted = [answer.tokens[0].top[0][0] if answer.tokens and answer.tokens[0].top else "" for answer in both[1]]
        values = [
            np.array([_logprob(answer, token) for answer, token in zip(answers, wanted, strict=True)])
            for answers in both
        ]
        ours, theirs = (value.reshape(-1, repeats) for value in values)
        difference, p = first_token(ours, theirs, seed=self.seed)
        name = "log-probabilities of the first token"
        if difference <= SAME:
            return Check(name, True, f"differ by {difference:.2g} on average", {"difference": difference})
        return self._p_check(name, difference, p, 2 * len(prompts))

    def _p_check(self, name: str, value: float, p: float, requests: int) -> Check:
        allowed = self.budget.alpha / self.budget.tests
        figures = {"statistic": round(value, 6), "p_value": p, "requests": requests}
        return Check(name, p > allowed, f"p-value {p:.2g} of {requests} answers", figures)


def add_tokens(bets: Bets, tokens: Sequence[SampledToken]) -> None:
    """Bet on the tokens of an answer, by the log-probabilities that the server told with them."""
    known = [(i, token) for i, token in enumerate(tokens) if len(token.top) >= 2 and np.isfinite(token.logprob)]
    if not known:
        return
    width = min(len(token.top) for _, token in known)
    p = np.exp(np.array([[value for _, value in token.top[:width]] for _, token in known]))
    rest = np.clip(1 - p.sum(1, keepdims=True), 1e-9, 1)
    p = np.concatenate([p, rest], 1)
    logprobs = np.array([token.logprob for _, token in known])
    told = np.log(p[:, :-1])
    columns = (told > logprobs[:, None] + SAME_LOGPROB).sum(1)
    inside = np.abs(told - logprobs[:, None]).min(1) < SAME_LOGPROB
    columns = np.where(inside, columns, width)  # of two tokens with one text a server may tell only one
    bets.add(p, True, columns.astype(np.int64), np.array([i for i, _ in known], np.int64))


def _gap(a: Sequence[SampledToken] | None, b: Sequence[SampledToken] | None) -> float | None:
    """How far apart the log-probabilities of the first tokens that differ are, by whichever server puts them nearer."""
    if not a or not b:
        return None
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x.text != y.text), None)
    if at is None:
        return None
    gaps = []
    for mine, other in ((a[at], b[at]), (b[at], a[at])):
        found = dict(mine.top).get(other.text)
        if found is not None:
            gaps.append(abs(mine.logprob - found))
    return min(gaps, default=None)


def _logprob(answer: Completion, token: str) -> float:
    """Of a first token; the least that was told where it is not among the likeliest."""
    top = dict(answer.tokens[0].top) if answer.tokens else {}
    return top.get(token, min(top.values(), default=-20.0))
