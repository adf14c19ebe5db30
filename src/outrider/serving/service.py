"""What endpoints ask of the model: prompts checked, requests admitted within the limits, counts for their usage."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import time
from typing import Any

from outrider import registry
from outrider.config import Grammar, SamplingParams
from outrider.engine.llm import LLM
from outrider.engine.request import Request
from outrider.errors import InvalidRequest
from outrider.scheduling.cost_model import CostModel
from outrider.serving.engine_thread import Answer, EngineThread
from outrider.serving.fields import OutriderOptions
from outrider.serving.metrics import Metrics
from outrider.serving.settings import ServerSettings
from outrider.serving.telemetry import Telemetry
from outrider.serving.web import ApiError
from outrider.version import __version__

__all__ = ["Service", "cached_tokens"]

INLINE = 4096  # characters that are turned into tokens at once; longer texts go to a thread

log = logging.getLogger("outrider.serving")


@dataclass
class Service:
    """One model, its engine's thread, and the server's limits."""

    llm: LLM
    settings: ServerSettings
    costs: CostModel | None = None
    """What passes cost; the policy learns it while it runs. None: unknown, and nothing is said of time saved."""
    keys: tuple[bytes, ...] = ()
    telemetry: Telemetry | None = None
    draining: bool = False
    created: int = field(default_factory=lambda: int(time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.llm.engine)
        self.thread = EngineThread(self.llm.engine, self.metrics.tokens, self._ended)
        self.metrics.thread = self.thread
        self._texts: dict[int, tuple[str, bytes]] = {}  # at most the vocabulary
        self._longest_token = max((len(token) for token in self.llm.tokenizer.vocabulary), default=1)

    @property
    def fingerprint(self) -> str:
        """Of everything on the server's side that a seeded text depends on."""
        return f"outrider-{__version__}"

    # ------------------------------------------------------------------------------------------ what is asked

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for a model that is not the one served."""
        known = self.settings.served_name
        if name not in (None, known):
            raise ApiError(
                404,
                f"the model {str(name)[:100]!r} does not exist here: this server has {known!r}",
                param="model",
                code="model_not_found",
            )

    def check_options(self, options: OutriderOptions | None) -> None:
        """Raises ApiError for a drafter or policy that this server does not run."""
        for name, own in (("drafter", self.llm.drafter_name), ("policy", self.settings.policy)):
            asked = getattr(options, name, None)
            if asked not in (None, own, "none"):
                known = f"; {asked!r} is a {name} of another server's" if asked in registry.names(name) else ""
                raise ApiError(
                    400,
                    f"outrider.{name}: this server has {own!r} and 'none', got {asked[:80]!r}{known}",
                    param=f"outrider.{name}",
                )

    async def encode(self, make: Callable[[], list[int]], characters: int, name: str) -> list[int]:
        """Tokens of a prompt, made by ``make`` from so many characters. Raises ApiError and InvalidRequest."""
        most = self.settings.max_prompt_tokens or self.llm.target.spec.max_positions
        if characters > most * self._longest_token:  # too long whatever its tokens are
            raise ApiError(
                400,
                f"{name} has {characters} characters, which is more than {most} tokens; shorten it",
                param=name,
                code="context_length_exceeded",
            )
        tokens = make() if characters < INLINE else await asyncio.to_thread(make)
        if len(tokens) > most:
            raise ApiError(
                400,
                f"{name} has {len(tokens)} tokens, and this server takes at most {most}; shorten it",
                param=name,
                code="context_length_exceeded",
            )
        return tokens

    def check_ids(self, ids: Sequence[int], name: str) -> None:
        """Raise ApiError for a client's token ids that are none of the target's."""
        size = self.llm.target.spec.vocab_size
        wrong = next((token for token in ids if not 0 <= token < size), None)
        if wrong is not None:
            raise ApiError(400, f"{name}: token ids must be between 0 and {size - 1}, got {wrong}", param=name)

    def check_n(self, n: int) -> None:
        """Raise ApiError for more answers to a prompt than the limit."""
        if n > self.settings.max_n:
            raise ApiError(400, f"n: this server gives at most {self.settings.max_n} answers, got {n}", param="n")

    async def check_grammar(self, grammar: Grammar, name: str) -> None:
        """Compile a grammar, which may take long. Raises ApiError for one that cannot be used; ``name``: its field."""
        try:
            await asyncio.to_thread(self.llm.engine.check_grammar, grammar)
        except InvalidRequest as error:
            raise ApiError(400, f"{name}: {error}", param=name) from None

    def new_tokens(
        self, prompt: Sequence[int], asked: int | None, name: str = "max_tokens", prompt_name: str = "prompt"
    ) -> int:
        """How many tokens may follow a prompt. Raises ApiError for more than the limits."""
        limit, room = self.settings.max_new_tokens, self.llm.engine.limit
        if asked is not None and limit is not None and asked > limit:
            raise ApiError(400, f"{name}: this server writes at most {limit} tokens, got {asked}", param=name)
        whole = room - len(prompt)
        if whole < (asked or 1):
            has = f"{prompt_name} has {len(prompt)} tokens"
            if whole < 1:
                param, message = prompt_name, f"{has}, and this server has room for {room} with the answer; shorten it"
            else:
                param = name
                message = f"{has} and {name} is {asked}, and this server has room for {room} in all; lower one of them"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        if asked is not None:
            return asked
        left = min(self.llm.capacity, room) - len(prompt)  # beyond the capacity, memory would be laid out anew
        return min(left if left >= 64 else whole, limit or whole)

    def token_text(self, token: int) -> tuple[str, bytes]:
        """A token's text, with U+FFFD where it is part of a character, and its bytes."""
        if token not in self._texts:
            tokenizer = self.llm.tokenizer
            raw = tokenizer.token_bytes(token) if tokenizer.is_byte_level else tokenizer.decode([token], False).encode()
            self._texts[token] = raw.decode("utf-8", "replace"), raw
        return self._texts[token]

    # ------------------------------------------------------------------------------------------ requests

    async def submit(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int, prediction: Sequence[int] = ()
    ) -> list[Answer]:
        """``n`` answers to each prompt, in order, none of them refused once one has begun.

        Raises ApiError for too many requests, also when they wait too long, InvalidRequest for one that cannot run.
        """
        self.check_n(n)
        running, wanted, most = self.thread.unfinished, n * len(prompts), self.settings.max_requests
        if wanted > most:  # however long the client waits
            raise ApiError(
                400,
                f"n: {n} answers to {len(prompts)} prompts are {wanted}, this server takes at most {most}",
                param="n",
            )
        if running + wanted > most:
            self._refuse(f"{running} requests run and wait, the limit is {most}")
        if prediction and (self.llm.drafter.block == 0 or params.draft_tokens == 0):
            raise ApiError(400, "prediction: nothing is drafted for this request; leave it out", param="prediction")
        for prompt in prompts:
            self.llm.engine.check(prompt, params)
        answers: list[Answer] = []
        try:
            for index in range(n * len(prompts)):
                seed = secrets.randbits(63) if params.seed is None else params.seed + index % n
                one = replace(params, seed=None if params.seed is None else seed)
                context = None if self.telemetry is None else self.telemetry.here()
                answers.append(self.thread.submit(prompts[index // n], one, seed, index, prediction, context))
            first = answers[0]  # the others may wait for rows that it and its like have
            if not await first.started(self.settings.queue_seconds):
                self._refuse(f"no row became free within {self.settings.queue_seconds:g} seconds")
            if first.request.error is not None and not first.request.events:
                raise first.request.error
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        return answers

    def _ended(self, answer: Answer) -> None:
        """In the engine's thread, where alone the policy's costs may be read."""
        if self.costs is not None:
            answer.seconds_saved = _seconds_saved(self.costs, answer.request)
        self.metrics.finished(answer)
        if self.telemetry is not None:
            self.telemetry.finished(answer, answer.context)

    def _refuse(self, reason: str) -> None:
        self.metrics.refused()
        raise ApiError(
            429, f"the server is busy: {reason}; try again later", code="rate_limit_exceeded", retry_after=self.patience
        )

    @property
    def patience(self) -> int:
        """Seconds after which a row should be free: what requests took lately, for those that wait."""
        waiting = max(1, self.thread.unfinished - self.llm.max_rows)
        return max(1, min(60, round(self.metrics.mean_seconds * waiting / self.llm.max_rows)))

    # ------------------------------------------------------------------------------------------ usage

    def usage(self, answers: Sequence[Answer], n: int | None = None) -> dict[str, Any]:
        """OpenAI's counts over the answers of one request, and the block ``speculative``. ``n``: so many answers follow
        each other for every prompt, which is counted once; None: there is one prompt."""
        first = answers[:: n or len(answers)]
        prompt = sum(answer.request.prompt_length for answer in first)
        generated = sum(answer.request.stats.generated for answer in answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(map(cached_tokens, first))},
            "speculative": self.speculative(answers),
        }

    def speculative(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The block ``speculative`` of a usage: counts over the answers of one request."""
        stats = [answer.request.stats for answer in answers]
        rounds, drafted, accepted = (sum(getattr(s, n) for s in stats) for n in ("rounds", "drafted", "accepted"))
        saved = [answer.seconds_saved for answer in answers]
        return {
            "drafter": self.llm.drafter_name,
            "rounds": rounds,
            "drafted": drafted,
            "accepted": accepted,
            "drafted_per_position": _summed([s.drafted_per_position for s in stats]),
            "accepted_per_position": _summed([s.accepted_per_position for s in stats]),
            "acceptance_length": round(1 + accepted / rounds, 4) if rounds else 1.0,
            "milliseconds_saved": None if None in saved else round(1000 * sum(s for s in saved if s), 3),
        }


def cached_tokens(answer: Answer) -> int:
    """Tokens of the prompt whose keys and values were there already."""
    return answer.request.stats.cached_tokens


def _seconds_saved(costs: CostModel, request: Request) -> float:
    """Passes of one row that accepted drafts made unnecessary, less what longer passes and drafting cost."""
    stats = request.stats
    if not stats.rounds or not stats.drafted:
        return 0.0
    context, mean = len(request.history), stats.drafted / stats.rounds
    plain = costs.verify(1, 1, context)
    low, high = (costs.verify(1 + n, 1, context) for n in (int(mean), int(mean) + 1))
    longer = low + (high - low) * (mean - int(mean)) - plain
    drafting = costs.draft(1, max(1, round(mean)))
    return stats.accepted * plain - stats.rounds * (longer + drafting)


def _summed(counts: Sequence[Sequence[int]]) -> list[int]:
    width = max(map(len, counts), default=0)
    return [sum(one[j] for one in counts if j < len(one)) for j in range(width)]
